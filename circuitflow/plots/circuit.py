"""Figure: the circuit. A line per site from the embedding up, nodes as labelled boxes, edges beside the boxes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from circuitflow.circuits.circuit import METRIC, Node, read_circuit
from circuitflow.features.descriptions import read_descriptions
from circuitflow.jobs import Output
from circuitflow.plots.audit import remark
from circuitflow.plots.circuit_layout import ACROSS, Grid, Layout, lane_of, place
from circuitflow.plots.circuit_marks import (
    BAND,
    LABEL,
    THICKEST,
    Drawing,
    edge_curve,
    edge_width,
    legend,
    node_box,
    node_mark,
    note,
    short_name,
    stub,
    words_of,
)
from circuitflow.plots.circuit_routes import bands, routes
from circuitflow.plots.numbers import signed
from circuitflow.plots.style import Style, as_many_as_fit, drawing, fitting, save, style_of, text_width
from circuitflow.plots.tables import unit_of
from circuitflow.store.tables import read_table

__all__ = ["THICKEST", "Drawing", "draw", "edge_width", "plot_circuit"]

LANE_NAMES = ("attention", "MLP", "residual stream")


def plot_circuit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. The circuit's nodes with what they fire on, its strongest edges, and the metric.

    Inputs ``circuit`` (JSON), ``features`` (list of descriptions), optionally ``audit`` (table ``summary`` of
    audit_circuit, for a sentence in the note); params ``style``, ``max_edges``, optionally
    ``metric``; outputs ``png``, ``svg``. In the SVG, node i of the circuit is the group ``node-i``, an edge is
    ``edge-i-j`` (the metric: ``m``).
    """
    style = style_of(params)
    circuit, descriptions = read_circuit(Path(inputs["circuit"])), read_descriptions(inputs["features"])
    audit = remark(read_table(inputs["audit"])) if "audit" in inputs else ""
    drawn = Drawing(circuit, descriptions, int(params["max_edges"]), unit_of(params.get("metric")), audit)
    with drawing(style):
        save(draw(drawn, style), out, style)


def draw(drawn: Drawing, style: Style) -> Figure:
    """The figure; lengths are inches throughout, so that boxes fit their text whatever the number of nodes."""
    circuit = drawn.circuit
    columns = {site: [node.id for node in circuit.at(site)] for site in circuit.sites}
    grid, layout = place(columns, [(edge.up, edge.down, edge.weight) for edge in drawn.edges])
    figure = Figure(figsize=(layout.width, layout.height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, layout.width), ylim=(0, layout.height))
    axes.set_axis_off()
    _names(axes, drawn, grid, layout, style)
    _edges(axes, drawn, grid, layout, style)
    for node in circuit.nodes:
        _node(axes, node, drawn, grid, layout, style)
    _metric(axes, layout, style)
    legend(axes, drawn, note(drawn), layout.width, style)
    return figure


def _names(axes: Axes, drawn: Drawing, grid: Grid, layout: Layout, style: Style) -> None:
    """Title, names of lanes and sites, a band behind every second layer."""
    muted = style.palette.muted
    axes.text(
        0.12, layout.height - 0.12, drawn.title, fontweight="bold", fontsize=style.font_size * 1.3, va="top"
    )
    layer_of = {site: site.partition(".")[2] or site for site in drawn.circuit.sites}
    for number, (_, low, high) in enumerate(bands(layout, grid, layer_of)):
        if number % 2 == 0:
            axes.add_patch(Rectangle((0, low), layout.width, high - low, color=BAND, linewidth=0, zorder=0))
    for line in layout.lines:
        if line.first:
            axes.text(0.12, line.y, line.site, fontweight="bold", va="center_baseline", zorder=2)
    lanes = {lane_of(line.site) for line in layout.lines if line.site != "embed"}
    if len(lanes) > 1:
        width = grid.box + (ACROSS - 1) * grid.pitch
        y = layout.height - 0.66
        axes.plot([grid.left, grid.left + width], [y - 0.05, y - 0.05], color=style.palette.grid, linewidth=1)
        for lane in sorted(lanes):
            x, align = grid.left + width * lane / 2, ("left", "center", "right")[lane]
            axes.text(x, y, LANE_NAMES[lane], ha=align, va="bottom", color=muted, fontweight="bold")


def _edges(axes: Axes, drawn: Drawing, grid: Grid, layout: Layout, style: Style) -> None:
    """Edges between boxes; those into the metric are drawn whole from the last site, from others as a stub."""
    last = layout.lines[-1].site if layout.lines else ""
    site = {node.id: node.site for node in drawn.circuit.nodes}
    whole = [edge for edge in drawn.edges if edge.down != METRIC or site[edge.up] == last]
    ways = routes([(edge.up, edge.down) for edge in whole], grid, layout)
    for edge in drawn.edges:
        way = ways.get((edge.up, edge.down))
        if way is None:
            stub(axes, edge, edge.up, drawn, grid, layout, style)
            continue
        edge_curve(axes, edge, way, drawn, style)


def _node(axes: Axes, node: Node, drawn: Drawing, grid: Grid, layout: Layout, style: Style) -> None:
    x, y = layout.places[node.id]
    share = abs(node.score) / drawn.strongest_node
    box = node_box(axes, node, (x, y - grid.height / 2), (grid.box, grid.height), share, style)
    box.set_gid(f"node-{drawn.numbers[node.id]}")
    node_mark(axes, node, (x + 0.1, y), style)
    size, score = style.font_size * LABEL, signed(node.score, 2)
    words = words_of(drawn.descriptions.get((node.site, node.feature)))
    room = grid.box - 0.18 - 0.16 - text_width(score, size * 0.9)
    text: dict[str, Any] = {"va": "center_baseline", "zorder": 4}
    axes.text(x + grid.box - 0.09, y, score, ha="right", fontsize=size * 0.9, **text)
    axes.text(x + 0.18, y, _label(short_name(node), words, room, size), fontsize=size, **text)


def _label(name: str, words: list[str], room: float, size: float) -> str:
    """Name and words as far as they fit; a first word that does not fit whole is cut rather than left out."""
    line = as_many_as_fit([name, *words], room, size)
    if words and line == name:
        cut = fitting(f"{name}  {words[0]}", room, size)
        return cut if len(cut) > len(name) + 4 else name
    return line


def _metric(axes: Axes, layout: Layout, style: Style) -> None:
    x, y = layout.metric
    (diamond,) = axes.plot([x], [y], "D", markersize=14, color=style.palette.text, zorder=4)
    diamond.set_gid("node-m")
    axes.text(x + 0.22, y, "metric", fontweight="bold", va="center_baseline")

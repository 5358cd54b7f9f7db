"""Figure: the circuit. Sites from left to right, nodes as labelled boxes, edges as curves between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node, read_circuit
from circuitflow.features.descriptions import Descriptions, fires_on, read_descriptions
from circuitflow.jobs import Output
from circuitflow.plots.circuit_layout import Grid, Layout, place
from circuitflow.plots.numbers import signed
from circuitflow.plots.style import TINY, Style, as_many_as_fit, drawing, save, shown, style_of, text_width
from circuitflow.plots.tables import unit_of

THINNEST, THICKEST = 0.35, 5.5  # points
FAINTEST, STRONGEST = 0.05, 0.55  # opacity of a node's tint


@dataclass(frozen=True)
class Drawing:
    """What is drawn: a circuit with descriptions of its features, and how many of its edges."""

    circuit: Circuit
    descriptions: Descriptions
    max_edges: int
    unit: str = "logits"

    @property
    def title(self) -> str:
        """Model and task, if the circuit's provenance names them."""
        made = self.circuit.provenance
        return " · ".join(str(made[name]) for name in ("model", "task") if name in made)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The edges with the largest |weight|, the weakest of them first: the strongest are drawn on top."""
        return tuple(sorted(self.circuit.edges, key=lambda edge: -abs(edge.weight))[: self.max_edges][::-1])

    @cached_property
    def numbers(self) -> dict[str, str]:
        """The number of each node in the circuit, "m" for the metric: they name the SVG's groups."""
        return {**{node.id: str(number) for number, node in enumerate(self.circuit.nodes)}, METRIC: "m"}

    @cached_property
    def strongest_edge(self) -> float:
        """The largest |weight|; 1 if there are no edges."""
        return max((abs(edge.weight) for edge in self.edges), default=0.0) or 1.0

    @cached_property
    def strongest_node(self) -> float:
        """The largest |score|; 1 if there are no nodes."""
        return max((abs(node.score) for node in self.circuit.nodes), default=0.0) or 1.0


def plot_circuit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. The circuit's nodes with what they fire on, its strongest edges, and the metric.

    Inputs ``circuit`` (JSON), ``features`` (list of descriptions); params ``style``, ``max_edges``, optionally
    ``metric``; outputs ``png``,
    ``svg``. In the SVG, node i of the circuit is the group ``node-i``, an edge is ``edge-i-j`` (the metric: ``m``).
    """
    style = style_of(params)
    circuit, descriptions = read_circuit(Path(inputs["circuit"])), read_descriptions(inputs["features"])
    drawn = Drawing(circuit, descriptions, int(params["max_edges"]), unit_of(params.get("metric")))
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
    _headers(axes, drawn, columns, grid, layout, style)
    for edge in drawn.edges:
        _edge(axes, edge, drawn, grid, layout, style)
    for node in circuit.nodes:
        _node(axes, node, drawn, grid, layout, style)
    _metric(axes, layout, style)
    _legend(axes, drawn, layout, style)
    return figure


def _headers(
    axes: Axes, drawn: Drawing, columns: Mapping[str, Sequence[str]], grid: Grid, layout: Layout, style: Style
) -> None:
    axes.text(
        grid.left,
        layout.height - 0.16,
        drawn.title,
        fontweight="bold",
        fontsize=style.font_size * 1.3,
        va="top",
    )
    for site, nodes in columns.items():
        left, y = layout.columns[site], layout.height - grid.top + 0.16
        count = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
        axes.text(left, y, site, fontweight="bold", va="bottom")
        axes.text(
            left + grid.box,
            y,
            count,
            ha="right",
            va="bottom",
            fontsize=style.font_size * TINY,
            color=style.palette.muted,
        )
        axes.plot([left, left + grid.box], [y - 0.05, y - 0.05], color=style.palette.grid, linewidth=1)


def _edge(axes: Axes, edge: Edge, drawn: Drawing, grid: Grid, layout: Layout, style: Style) -> None:
    x0, y0 = layout.places[edge.up]
    x1, y1 = layout.metric if edge.down == METRIC else layout.places[edge.down]
    x0, bend = x0 + grid.box, grid.gap * 0.5
    share = abs(edge.weight) / drawn.strongest_edge
    patch = PathPatch(
        Curve(
            [(x0, y0), (x0 + bend, y0), (x1 - bend, y1), (x1, y1)],
            [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
        ),
        facecolor="none",
        edgecolor=_sign_colour(edge.weight, style),
        linewidth=edge_width(share),
        alpha=0.3 + 0.5 * share**0.5,
        capstyle="butt",
        zorder=1,
    )
    patch.set_gid(f"edge-{drawn.numbers[edge.up]}-{drawn.numbers[edge.down]}")
    axes.add_patch(patch)


def edge_width(share: float) -> float:
    """Line width in points of an edge with ``share`` of the largest |weight|.

    It grows with the square root: the edges into the metric carry whole scores and would make hairlines of all others.
    """
    return THINNEST + (THICKEST - THINNEST) * share**0.5


def _sign_colour(value: float, style: Style) -> str:
    return style.palette.positive if value >= 0 else style.palette.negative


def _node(axes: Axes, node: Node, drawn: Drawing, grid: Grid, layout: Layout, style: Style) -> None:
    x, y = layout.places[node.id]
    inset, colour = 0.03, _sign_colour(node.score, style)
    share = abs(node.score) / drawn.strongest_node
    box = FancyBboxPatch(
        (x + inset, y - grid.height / 2 + inset),
        grid.box - 2 * inset,
        grid.height - 2 * inset,
        boxstyle=f"round,pad={inset},rounding_size=0.05",
        facecolor=_tint(colour, FAINTEST + (STRONGEST - FAINTEST) * share, style),
        edgecolor=colour,
        linewidth=0.7,
        zorder=2,
    )
    box.set_gid(f"node-{drawn.numbers[node.id]}")
    axes.add_patch(box)
    _label(axes, node, drawn.descriptions, (x, y), grid, style)


def _tint(colour: str, opacity: float, style: Style) -> tuple[float, ...]:
    """The colour laid thinly over the paper, itself opaque, so that no edge shines through a box."""
    front, back = np.array(to_rgba(colour)[:3]), np.array(to_rgba(style.palette.paper)[:3])
    return tuple(float(value) for value in front * opacity + back * (1 - opacity))


def _label(
    axes: Axes, node: Node, descriptions: Descriptions, at: tuple[float, float], grid: Grid, style: Style
) -> None:
    (x, y), size, error = at, style.font_size * 0.78, node.kind == "error"
    colour = style.palette.error if error else style.palette.feature
    axes.plot([x + 0.1], [y], "^" if error else "o", markersize=5.5 if error else 4.5, color=colour, zorder=3)
    name = "error" if error else f"#{node.feature}"
    name = name if node.position is None else f"{name} @{node.position}"
    score = signed(node.score, 2)
    words = shown(fires_on(descriptions.get((node.site, node.feature))))
    room = grid.box - 0.19 - 0.18 - text_width(score, size * 0.88)
    text: dict[str, Any] = {"va": "center_baseline", "zorder": 3}
    axes.text(x + grid.box - 0.06, y, score, ha="right", fontsize=size * 0.88, **text)
    axes.text(x + 0.19, y, as_many_as_fit([name, *words], room, size), fontsize=size, **text)


def _metric(axes: Axes, layout: Layout, style: Style) -> None:
    x, y = layout.metric[0] + 0.1, layout.metric[1]
    below: dict[str, Any] = {"ha": "center", "va": "top"}
    (mark,) = axes.plot([x], [y], "D", markersize=13, color=style.palette.text, zorder=3)
    mark.set_gid("node-m")
    axes.text(x, y - 0.2, "metric", fontweight="bold", fontsize=style.font_size * 0.85, **below)
    axes.text(
        x,
        y - 0.36,
        "what the circuit\nis measured on",
        fontsize=style.font_size * TINY,
        color=style.palette.muted,
        **below,
    )


def _legend(axes: Axes, drawn: Drawing, layout: Layout, style: Style) -> None:
    palette = style.palette
    marks = [
        _mark("feature: number, tokens it fires on", marker="o", markersize=4.5, color=palette.feature),
        _mark("error of the site's dictionary", marker="^", markersize=5.5, color=palette.error),
        _mark("> 0, supports the clean answer", linestyle="-", linewidth=2.5, color=palette.positive),
        _mark("< 0, opposes it", linestyle="-", linewidth=2.5, color=palette.negative),
    ]
    widths = [
        _mark(
            f"edge of {share * drawn.strongest_edge:.2g}",
            linestyle="-",
            linewidth=edge_width(share),
            color=palette.muted,
        )
        for share in (0.01, 0.1, 1.0)
    ]
    columns = len(marks + widths) if layout.width > 10 else 4
    spacing: dict[str, Any] = {
        "columnspacing": 1.3,
        "handlelength": 1.6,
        "handletextpad": 0.5,
        "borderaxespad": 0.2,
    }
    axes.legend(handles=marks + widths, loc="lower left", bbox_to_anchor=(0, 0), ncols=columns, **spacing)
    height = 0.36 if columns > 4 else 0.52
    axes.text(0.1, height, _note(drawn), fontsize=style.font_size * TINY * 1.06, color=palette.muted)


def _mark(label: str, **look: Any) -> Line2D:
    return Line2D([], [], label=label, **{"linestyle": "", **look})


def _note(drawn: Drawing) -> str:
    nodes, edges, in_all = len(drawn.circuit.nodes), len(drawn.edges), len(drawn.circuit.edges)
    shown = f"all {edges} edges" if edges == in_all else f"the {edges} strongest of {in_all} edges"
    return (
        f"{nodes} nodes, {shown}. Number in a box: indirect effect in {drawn.unit}, which also tints it. "
        "Edges: the part of that effect which runs through the other end."
    )

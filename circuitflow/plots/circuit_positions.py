"""Figure: the circuit over the tokens of one kind of prompt. Columns are positions, rows are sites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from circuitflow.circuits.circuit import METRIC, Node, read_circuit
from circuitflow.errors import UserError, nearest
from circuitflow.features.descriptions import read_descriptions
from circuitflow.jobs import Output
from circuitflow.plots.audit import remark
from circuitflow.plots.circuit_cells import BOTTOM, BOX, HEIGHT, TOP, Cells, arrange, key
from circuitflow.plots.circuit_marks import (
    BAND,
    LABEL,
    Drawing,
    chosen_how,
    edge_curve,
    legend,
    node_box,
    node_mark,
    stub,
    words_of,
)
from circuitflow.plots.circuit_routes import routes
from circuitflow.plots.style import SMALL, Style, as_many_as_fit, drawing, fitting, save, shown, style_of
from circuitflow.plots.tables import Table, rows, unit_of
from circuitflow.store.tables import read_table


@dataclass(frozen=True)
class Spread:
    """Where the nodes of a circuit act in the prompts of one case, and an example of these prompts."""

    case: str
    pairs: int
    """Training pairs of the case; 0 if every node has its own position."""
    places: dict[str, dict[int, float]]
    """By node: positions with their scores, those of a small share left out."""
    clean: list[str]
    patched: list[str]


def plot_circuit_positions(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. At which tokens the nodes act, for the prompts of one case.

    Inputs ``circuit``, ``features`` (list of descriptions), ``tokens`` (training split of tokenize_pairs or
    filter_pairs) and ``positions`` (list of the tables ``{site}.positions.parquet`` of score_nodes, in the order of the
    circuit's sites; may be empty if all nodes have a position), optionally ``audit`` (table ``summary`` of
    audit_circuit); params ``style``, ``case`` (null: the first), ``max_nodes``, ``max_edges``, ``share`` (a node stands
    at each position with at least this share of Σ|score|), optionally ``metric``; outputs ``png``, ``svg``.

    :raises UserError: a case that does not exist.
    """
    style = style_of(params)
    circuit = read_circuit(Path(inputs["circuit"]))
    strongest = sorted(circuit.nodes, key=lambda node: -abs(node.score))[: int(params["max_nodes"])]
    files = list(inputs.get("positions") or [])
    tables = dict(zip(circuit.sites, map(read_table, files), strict=True)) if files else {}
    tokens = read_table(inputs["tokens"])
    spread = spread_of(strongest, tables, tokens, params.get("case"), float(params["share"]))
    found = read_descriptions(inputs["features"])
    audit = remark(read_table(inputs["audit"])) if "audit" in inputs else ""
    drawn = Drawing(circuit, found, int(params["max_edges"]), unit_of(params.get("metric")), audit)
    with drawing(style):
        save(draw(drawn, spread, style), out, style)


def spread_of(
    nodes: Sequence[Node], tables: Mapping[str, Table], tokens: Table, case: str | None, share: float
) -> Spread:
    """Positions of the nodes in one case.

    :param tables: scores by position of each site; nodes with a position of their own need none.
    """
    known = list(dict.fromkeys(str(name) for name in tokens["case"]))
    case = known[0] if case is None and known else str(case)
    if case not in known:
        raise UserError(f"plots.case: '{case}' is no case of the training prompts; {nearest(case, known)}.")
    here = {site: rows(table, split="train", case=case) for site, table in tables.items()}
    places = {node.id: _places(node, here.get(node.site), share) for node in nodes}
    pairs = max((int(table["n"].max()) for table in here.values() if len(table["n"])), default=0)
    example = int(np.flatnonzero(tokens["case"] == case)[0])
    clean, patched = (
        [str(token) for token in tokens[f"{side}_tokens"][example]] for side in ("clean", "patch")
    )
    return Spread(case, pairs, {name: found for name, found in places.items() if found}, clean, patched)


def _places(node: Node, table: Table | None, share: float) -> dict[int, float]:
    if node.position is not None:
        return {node.position: node.score}
    if table is None:
        return {}
    own = rows(table, kind=node.kind, feature=node.feature)
    total = float(np.abs(own["score"]).sum())
    pairs = zip(own["position"].tolist(), own["score"].tolist(), strict=True)
    return {int(at): float(score) for at, score in pairs if total and abs(score) >= share * total}


def draw(drawn: Drawing, spread: Spread, style: Style) -> Figure:
    """The figure; lengths are inches throughout."""
    cells = arrange(drawn.circuit, spread.places, len(spread.clean))
    layout = cells.layout
    figure = Figure(figsize=(layout.width, layout.height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, layout.width), ylim=(0, layout.height))
    axes.set_axis_off()
    _frame(axes, drawn, spread, cells, style)
    _tokens(axes, spread, cells, style)
    _edges(axes, drawn, spread, cells, style)
    strongest = max((abs(s) for found in spread.places.values() for s in found.values()), default=0.0) or 1.0
    for node in drawn.circuit.nodes:
        for position, score in spread.places.get(node.id, {}).items():
            _node(axes, node, position, score, abs(score) / strongest, drawn, cells, style)
    _legend(axes, drawn, spread, cells, style)
    return figure


def _frame(axes: Axes, drawn: Drawing, spread: Spread, cells: Cells, style: Style) -> None:
    """Title, bands with their sites, the metric."""
    layout = cells.layout
    title = f"{drawn.title} · {spread.case}".strip(" ·")
    axes.text(0.12, layout.height - 0.12, title, fontweight="bold", fontsize=style.font_size * 1.3, va="top")
    for number, (site, (low, high)) in enumerate(cells.bands.items()):
        if number % 2 == 0:
            axes.add_patch(Rectangle((0, low), layout.width, high - low, color=BAND, linewidth=0, zorder=0))
        axes.text(0.12, (low + high) / 2, site, fontweight="bold", va="center_baseline", zorder=4)
    x, y = layout.metric
    (diamond,) = axes.plot([x], [y], "D", markersize=13, color=style.palette.text, zorder=5)
    diamond.set_gid("node-m")
    axes.text(x - 0.2, y, "metric", fontweight="bold", ha="right", va="center_baseline")


def _tokens(axes: Axes, spread: Spread, cells: Cells, style: Style) -> None:
    """Below each column the clean token, the patched one where it differs, and the position."""
    top, muted, size = cells.layout.height - TOP, style.palette.muted, style.font_size
    edges = {x for left, width in cells.columns.values() for x in (left, left + width)}
    for x in sorted(edges):
        axes.plot([x, x], [BOTTOM - 0.53, top], color=style.palette.grid, linewidth=0.8, zorder=0.5)
    for at, (left, width) in cells.columns.items():
        middle, room = left + width / 2, width - 0.06
        text: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 4}
        axes.text(middle, BOTTOM - 0.12, _token(spread.clean, at, room, size), fontsize=size, **text)
        if at < len(spread.patched) and spread.patched[at : at + 1] != spread.clean[at : at + 1]:
            token = _token(spread.patched, at, room, size)
            axes.text(middle, BOTTOM - 0.29, token, fontsize=size, color=style.palette.error, **text)
        axes.text(middle, BOTTOM - 0.45, str(at), fontsize=size * SMALL, color=muted, **text)
    for words, y in (("clean", 0.12), ("patched", 0.29), ("position", 0.45)):
        axes.text(0.12, BOTTOM - y, words, fontsize=size * SMALL, color=muted, va="center_baseline")


def _token(tokens: Sequence[str], at: int, room: float, size: float) -> str:
    return fitting(shown([tokens[at]])[0], room, size) if at < len(tokens) else ""


def _edges(axes: Axes, drawn: Drawing, spread: Spread, cells: Cells, style: Style) -> None:
    """Faint curves between the strongest positions of both ends; into the metric whole from the last site only."""
    at = {node: key(node, _strongest(found)) for node, found in spread.places.items()} | {METRIC: METRIC}
    last = next(reversed(cells.bands), "")
    site = {node.id: node.site for node in drawn.circuit.nodes}
    seen = [edge for edge in drawn.edges if edge.up in at and edge.down in at]
    whole = [edge for edge in seen if edge.down != METRIC or site[edge.up] == last]
    ways = routes([(at[edge.up], at[edge.down]) for edge in whole], cells.grid, cells.layout)
    for edge in seen:
        way = ways.get((at[edge.up], at[edge.down]))
        if way is None:
            stub(axes, edge, at[edge.up], drawn, cells.grid, cells.layout, style)
        else:
            edge_curve(axes, edge, way, drawn, style, faint=0.7)


def _strongest(places: Mapping[int, float]) -> int:
    return max(places, key=lambda at: (abs(places[at]), at))


def _node(
    axes: Axes, node: Node, at: int, score: float, share: float, drawn: Drawing, cells: Cells, style: Style
) -> None:
    """A box of two lines: the feature's number, and what it fires on. Its sign and tint are those of this position."""
    left, middle = cells.layout.places[key(node.id, at)]
    here = Node(node.site, node.kind, node.feature, score, node.position)
    box = node_box(axes, here, (left, middle - HEIGHT / 2), (BOX, HEIGHT), share, style)
    box.set_gid(f"node-{drawn.numbers[node.id]}" + ("" if node.position is not None else f"-{at}"))
    words = words_of(drawn.descriptions.get((node.site, node.feature)))
    name, size = "error" if node.kind == "error" else f"#{node.feature}", style.font_size * LABEL
    first = middle + (0.075 if words else 0)
    node_mark(axes, node, (left + 0.1, first), style)
    text: dict[str, Any] = {"va": "center_baseline", "zorder": 4, "fontsize": size}
    axes.text(left + 0.18, first, fitting(name, BOX - 0.22, size), **text)
    if words:
        axes.text(left + 0.08, middle - 0.075, as_many_as_fit(words, BOX - 0.12, size), **text)


def _legend(axes: Axes, drawn: Drawing, spread: Spread, cells: Cells, style: Style) -> None:
    legend(axes, drawn, _note(drawn, spread), cells.layout.width, style)


def _note(drawn: Drawing, spread: Spread) -> str:
    placed, nodes = len(spread.places), len(drawn.circuit.nodes)
    pairs = (
        f" Mean over the {spread.pairs} training pairs of this case; tokens of one of them."
        if spread.pairs
        else ""
    )
    said = (
        f"{placed} of {nodes} nodes act in this case and are shown, each where a large share of its effect "
        f"arises.{pairs} {chosen_how(drawn.circuit)} Tint: effect in {drawn.unit} at that position. Edges join the "
        f"strongest positions of their ends. {drawn.audit}"
    )
    return said.replace("  ", " ").rstrip()

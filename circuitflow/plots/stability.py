"""Figure: how surely the circuit's nodes and edges would be chosen again, had other pairs been drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from circuitflow.circuits.circuit import METRIC
from circuitflow.jobs import Output
from circuitflow.plots.numbers import counted, number, percent
from circuitflow.plots.style import Style, drawing, fitting, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, node_name, unit_of
from circuitflow.store.tables import read_table

SURE = 0.9
"""Share of resamples from which something counts as stable."""
ROW = 0.185  # inches
TOLD = 2.5


def plot_stability(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Scores of nodes and weights of edges with intervals, and the share of resamples that choose them.

    Inputs ``nodes`` and ``edges`` (tables of circuit_stability); params ``style``, ``max_rows`` (strongest nodes and
    edges shown), optionally ``metric``; outputs ``png``, ``svg``.
    """
    style, unit = style_of(params), unit_of(params.get("metric"))
    nodes, edges = (inside(read_table(inputs[name])) for name in ("nodes", "edges"))
    with drawing(style):
        save(draw(nodes, edges, int(params["max_rows"]), style, unit), out, style)


def inside(table: Table) -> dict[str, np.ndarray]:
    """The rows of what is in the circuit; a table that does not say holds nothing else."""
    keep = np.asarray(table["in_circuit"], bool) if "in_circuit" in table else slice(None)
    return {name: column[keep] for name, column in table.items()}


def draw(nodes: Table, edges: Table, most: int, style: Style, unit: str = "logits") -> Figure:
    """The figure: nodes above, edges below; left the effects, right the shares, of all of them at the far right."""
    tops = [_strongest(nodes["score"], most), _strongest(edges["weight"], most)]
    heights = [max(len(top), 4) * ROW + 0.75 for top in tops]
    figure = new_figure(10.5, sum(heights) + 0.9)
    spec = figure.add_gridspec(2, 3, height_ratios=heights, width_ratios=(1.5, 1, 1))
    parts = (
        ("Nodes", nodes, "score", [_node(nodes, row) for row in tops[0]], f"effect ({unit})"),
        ("Edges", edges, "weight", [_edge(edges, row) for row in tops[1]], f"weight ({unit})"),
    )
    for row, ((title, table, size, names, label), top) in enumerate(zip(parts, tops, strict=True)):
        left, middle, right = (figure.add_subplot(spec[row, column]) for column in range(3))
        _effects(left, table, size, names, top, style)
        left.set(title=f"{title}: strongest {len(top)} of {len(table[size])}", xlabel=label)
        _shares(middle, table, top, style)
        _all_shares(right, table, title, style)
    footnote(figure, _note(nodes, edges), style)
    return figure


def _strongest(values: np.ndarray, most: int) -> np.ndarray:
    return np.argsort(-np.abs(values), kind="stable")[:most]


def _node(table: Table, row: int) -> str:
    name = node_name(str(table["site"][row]), str(table["kind"][row]), int(table["feature"][row]))
    return name if table["position"][row] < 0 else f"{name} @{int(table['position'][row])}"


def _edge(table: Table, row: int) -> str:
    up, down = (str(table[end][row]) for end in ("up", "down"))
    return f"{_plain(up)} → {_plain(down)}"


def _plain(name: str) -> str:
    return name if name == METRIC else name.replace("/error", " error").replace("/", " #").replace("@", " @")


def _effects(
    axes: Axes, table: Table, size: str, names: Sequence[str], top: np.ndarray, style: Style
) -> None:
    places = np.arange(len(top))
    value, low, high = (table[name][top] for name in (size, "low", "high"))
    colours = [style.palette.positive if v >= 0 else style.palette.negative for v in value]
    axes.hlines(places, low, high, colors=colours, linewidth=1.6)
    for kind, marker in (("feature", "o"), ("error", "^")):
        error = np.array([" error" in name.partition(" →")[0] for name in names], bool)
        here = np.flatnonzero(error == (kind == "error"))
        axes.scatter(value[here], places[here], c=[colours[i] for i in here], marker=marker, s=22, zorder=3)
    axes.axvline(0, color=style.palette.muted, linewidth=0.8)
    labels = [fitting(name, TOLD, style.font_size * 0.85) for name in names]
    axes.set_yticks(places, labels)
    axes.set_ylim(len(top) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: number(tick, 2)))
    grid(axes, "x")


def _shares(axes: Axes, table: Table, top: np.ndarray, style: Style) -> None:
    places, share = np.arange(len(top)), table["selected"][top]
    colours = [style.palette.circuit if value >= SURE else style.palette.complement for value in share]
    axes.hlines(places, 0, share, colors=colours, linewidth=1.1)
    axes.scatter(share, places, c=colours, s=20, zorder=3)
    axes.axvline(SURE, color=style.palette.muted, linewidth=0.9, linestyle="--")
    axes.set(xlim=(0, 1.03), title="Chosen again", xlabel="share of resamples")
    axes.set_yticks(places, [""] * len(top))
    axes.set_ylim(len(top) - 0.4, -0.6)
    grid(axes, "x")


def _all_shares(axes: Axes, table: Table, title: str, style: Style) -> None:
    share = np.asarray(table["selected"], np.float64)
    edges = np.linspace(0, 1, 11)
    counts, _ = np.histogram(share, edges)
    sure = edges[:-1] >= SURE - 1e-9
    colours = [style.palette.circuit if yes else style.palette.complement for yes in sure]
    axes.bar(edges[:-1] + 0.05, counts, width=0.09, color=colours)
    stable = f"{percent(float((share >= SURE).mean()))} stable" if len(share) else "none"
    axes.set(
        xlim=(0, 1.03), title=f"All {len(share)}: {stable}", xlabel="share of resamples", ylabel=title.lower()
    )
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    grid(axes)


def _note(nodes: Table, edges: Table) -> str:
    told = []
    for name, table in (("nodes", nodes), ("edges", edges)):
        if len(table["selected"]):
            drawn = (
                f"{counted(int(table['resamples'][0]), 'resample')}" if "resamples" in table else "resamples"
            )
            pairs = f" of {int(table['pairs'][0])} training pairs" if "pairs" in table else ""
            told.append(f"{name}: {drawn}{pairs}")
    return (
        f"{'; '.join(told).capitalize()}. Bars: 95 % of the resamples. Stable (dashed line): chosen again by the "
        f"circuit's rule in at least {percent(SURE)} of them. Triangles: errors (of edges: from an error)."
    )

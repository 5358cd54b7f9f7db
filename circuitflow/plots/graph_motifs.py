"""Figure: chains of features that recur across the graphs of many prompts, against shuffled graphs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from circuitflow.jobs import Output
from circuitflow.plots.numbers import whole
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_provenance, read_table

CHAINS = 12
NOTE = (
    "{graphs} graphs. Left: chains of features by layer_number, those with the smallest p first; bars: graphs "
    "that the chain is in, marks: expected in shuffled graphs (every node keeps how many edges come in and go "
    "out; effects still run to later layers and not to earlier positions); filled: false discovery rate at "
    "most {level:g} among all chains that could recur ({found}). Right: chains in at least so many graphs, and"
    " in shuffled sets of graphs: mean and 95 % of them."
)


def plot_graph_motifs(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Recurring chains, and how many recur.

    Inputs ``motifs``, ``totals`` (tables of find_motifs); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    motifs, totals = (read_table(inputs[name]) for name in ("motifs", "totals"))
    level = float(read_provenance(inputs["motifs"]).get("level", 0.05))
    with drawing(style):
        save(draw(motifs, totals, level, style), out, style)


def draw(motifs: Table, totals: Table, level: float, style: Style) -> Figure:
    """The figure, from both tables."""
    lengths = list(dict.fromkeys(int(length) for length in totals["length"]))
    graphs = int(max(totals["graphs"], default=0))
    least = int(min(totals["graphs"], default=0))
    tall = [max(3, min(CHAINS, len(rows(motifs, length=length)["chain"]))) for length in lengths]
    figure = new_figure(10.0, sum(0.24 * n + 1.15 for n in tall) + 0.9)
    spec = figure.add_gridspec(max(len(lengths), 1), 2, width_ratios=(1.5, 1), height_ratios=tall or None)
    for line, length in enumerate(lengths):
        _chains(figure.add_subplot(spec[line, 0]), rows(motifs, length=length), length, graphs, least, style)
        _totals(figure.add_subplot(spec[line, 1]), rows(totals, length=length), line, style)
    found = [
        f"{whole(rows(motifs, length=length)['recurring'].sum())} of length {length}" for length in lengths
    ]
    footnote(figure, NOTE.format(graphs=graphs, level=level, found=", ".join(found) or "none"), style)
    return figure


def _chains(axes: Axes, motifs: Table, length: int, graphs: int, least: int, style: Style) -> None:
    n = min(CHAINS, len(motifs["chain"]))
    axes.set(title=f"Chains of {length} features", xlabel="graphs")
    axes.set_xlim(0, graphs * 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if not n:
        axes.text(0.5, 0.5, f"no chain is in {least} graphs or more", ha="center", transform=axes.transAxes)
        axes.set_yticks([])
        return
    for place in range(n):
        yes = bool(motifs["recurring"][place])
        colour = style.palette.feature if yes else style.palette.paper
        axes.barh(
            place,
            motifs["graphs"][place],
            height=0.7,
            color=colour,
            edgecolor=style.palette.feature,
            linewidth=0.8,
        )
    axes.plot(
        motifs["expected"][:n], np.arange(n), "|", color=style.palette.text, markersize=11, markeredgewidth=1.6,
        label="expected, shuffled",
    )  # fmt: skip
    axes.set_yticks(range(n), [str(chain).replace(">", "→") for chain in motifs["chain"][:n]])
    axes.set_ylim(max(n, 3) - 0.5, -0.5)
    axes.legend(loc="lower right", frameon=True, framealpha=0.85, edgecolor="none")
    grid(axes, "x")
    axes.tick_params(axis="y", length=0)


def _totals(axes: Axes, totals: Table, line: int, style: Style) -> None:
    x = totals["graphs"]
    axes.fill_between(
        x,
        totals["low"],
        totals["high"],
        color=style.palette.random,
        alpha=0.3,
        linewidth=0,
        label="shuffled, 95 %",
    )
    axes.plot(x, totals["expected"], "--", color=style.palette.random, label="shuffled, mean")
    axes.plot(x, totals["observed"], "o-", color=style.palette.feature, markersize=4, label="observed")
    axes.set(title="How many recur", xlabel="in at least so many graphs", ylabel="chains")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, max(1.5, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(lambda value, _: whole(value))
    axes.set_xlim(x.min() - 0.5, x.max() + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if not line:
        axes.legend(loc="upper right")
    grid(axes)

"""Figure: how much of the model's behaviour circuits of growing size keep, and what is left without them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from circuitflow.jobs import Output
from circuitflow.plots.conditions import main_rows, wanted_aggregate
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import ASSEMBLED, Table, rows, swept
from circuitflow.store.tables import read_provenance, read_table

SERIES = {
    "circuit": "C (faithfulness)",
    "complement": "all but C (completeness)",
    "random": "random circuits",
    "neurons": "circuits of neurons",
}
ABLATIONS = {"patched": "patched values", "resample": "resampled values"}
LIMITS = (-0.6, 1.6)  # beyond these a ratio says only "broken"
"""F is drawn at most within this range; outliers are marked at its edge."""


def plot_faithfulness(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. F of the circuit, of its complement and of random circuits against the number of nodes.

    Input ``faithfulness`` (table of evaluate_circuit); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    table = read_table(inputs["faithfulness"])
    conventions = read_provenance(inputs["faithfulness"]).get("conventions", {})
    with drawing(style):
        save(draw(table, conventions, style), out, style)


def draw(table: Table, conventions: Mapping[str, Any], style: Style) -> Figure:
    """The figure, from the table of faithfulness and what its numbers mean."""
    neurons = _neurons(table)
    table = main_rows(table)
    figure = new_figure(6.6, 4.1)
    axes = figure.subplots()
    _references(axes, style)
    _random(axes, swept(table, "random"), style)
    if len(neurons["F"]):
        look: dict[str, Any] = {"color": style.palette.train, "markersize": 3.5, "linewidth": 1.2}
        axes.fill_between(
            neurons["nodes"], neurons["low"], neurons["high"], alpha=0.15, color=look["color"], lw=0
        )
        axes.plot(neurons["nodes"], neurons["F"], "s-", **look, label=SERIES["neurons"])
    for series in ("complement", "circuit"):
        _curve(axes, swept(table, series), series, style)
        _assembled(axes, rows(table, series=series, source=ASSEMBLED), series, style)
    _scales(axes, table)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=3, columnspacing=1.2)
    footnote(figure, _note(table, conventions), style)
    return figure


def _neurons(table: Table) -> dict[str, np.ndarray]:
    """Circuits of coordinates under the main ablation and aggregate."""
    if "main" not in table or not (table["series"] == "neurons").any():
        return swept({name: column[:0] for name, column in table.items()}, "neurons")
    return swept(rows(wanted_aggregate(table), series="neurons"), "neurons")


def _curve(axes: Axes, part: Table, series: str, style: Style) -> None:
    colour = getattr(style.palette, series)
    axes.fill_between(part["nodes"], part["low"], part["high"], color=colour, alpha=0.18, linewidth=0)
    axes.plot(part["nodes"], part["F"], "o-", color=colour, markersize=4, label=SERIES[series])


def _assembled(axes: Axes, part: Table, series: str, style: Style) -> None:
    """The circuit itself, which takes its nodes from the pool of edges and so may lie beside the curve."""
    if len(part["nodes"]):
        look = {"color": getattr(style.palette, series), "markeredgecolor": style.palette.text, "zorder": 4}
        label = "the assembled circuit" if series == "circuit" else None
        axes.plot(
            part["nodes"],
            part["F"],
            "*",
            linestyle="",
            markersize=12,
            markeredgewidth=0.8,
            label=label,
            **look,
        )


def _random(axes: Axes, part: Table, style: Style) -> None:
    if not len(part["F"]):
        return
    nodes = np.unique(part["nodes"])
    drawn = [part["F"][part["nodes"] == count] for count in nodes]
    low, middle, high = np.array([np.percentile(values, (2.5, 50, 97.5)) for values in drawn]).T
    colour = style.palette.random
    axes.fill_between(nodes, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(
        nodes,
        middle,
        "--",
        color=colour,
        linewidth=1.2,
        label=f"{SERIES['random']} ({len(drawn[0])} per size)",
    )


def _references(axes: Axes, style: Style) -> None:
    for level, name in ((1.0, "whole\nmodel"), (0.0, "all nodes\nablated")):
        axes.axhline(level, color=style.palette.muted, linewidth=0.9, linestyle=":")
        axes.annotate(
            name,
            (1.01, level),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=style.font_size * 0.78,
            color=style.palette.muted,
        )


def _scales(axes: Axes, table: Table) -> None:
    counts = table["nodes"][table["nodes"] > 0]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(counts.min() / 1.25, counts.max() * 1.25)
    low, high = np.nanmin([table["F"], table["low"]]), np.nanmax([table["F"], table["high"]])
    axes.set_ylim(max(LIMITS[0], min(low, 0) - 0.06), min(LIMITS[1], max(high, 1) + 0.08))
    axes.set(xlabel="nodes in the circuit", ylabel="F: share of the model's preference kept")
    grid(axes)


def _note(table: Table, conventions: Mapping[str, Any]) -> str:
    n = int(table["n"].max())
    outside = int(np.sum((table["F"] < LIMITS[0]) | (table["F"] > LIMITS[1])))
    said = ". ".join(in_words(conventions))
    return (
        f"n = {n} test prompts. F(C) = (m(C) − m(∅)) / (m(M) − m(∅)); m: metric, M: whole model, ∅: empty circuit. "
        "Bands: 95 % bootstrap intervals over prompts; grey: median and 95 % of the random draws."
        + (f" {outside} points lie outside the picture." if outside else "")
        + (f"\n{said}." if said else "")
    )


def in_words(conventions: Mapping[str, Any]) -> list[str]:
    """The ablation, the first ablated site and the average, as sentences without their points."""
    found = []
    if "ablation" in conventions:
        name, _, become = str(conventions["ablation"]).partition(": ")
        found.append(f"Ablation by {ABLATIONS.get(name, name)}" + (f": {become}" if become else ""))
    if "start" in conventions:
        found.append(f"Start: {conventions['start']}")
    if "aggregate" in conventions:
        found.append(f"F: {str(conventions['aggregate']).replace('_', ' ')} over prompts")
    return found

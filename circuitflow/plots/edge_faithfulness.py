"""Figure: how much of the model's behaviour the circuit's strongest edges keep when no other carries anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from circuitflow.jobs import Output
from circuitflow.plots.conditions import main_rows
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import ASSEMBLED, Table, rows
from circuitflow.store.tables import read_table

LIMITS = (-0.6, 1.6)
NOTE = (
    "n = {n} test prompts; bands and whiskers: 95 % bootstrap intervals over prompts; grey: median and range of "
    "{draws} random draws per size, as many edges between each pair of sites. Every node and the metric see of each "
    "neighbouring site what the edges' upper ends are there, all other nodes replaced ({ablation}); "
    "F = (m − m(∅)) / (m(M) − m(∅)). With all edges F is that of the circuit's nodes (dashed), but for edges of weight "
    "0, which carry nothing.{outside}"
)


def plot_edge_faithfulness(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. F against the number of edges, for the strongest, the circuit's own, and random edges.

    Input ``edges`` (table of evaluate_edges); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    table = read_table(inputs["edges"])
    with drawing(style):
        save(draw(table, style), out, style)


def draw(table: Table, style: Style) -> Figure:
    """The figure, from the table of evaluate_edges."""
    table = main_rows(table)
    part = rows(table, series="circuit")
    nodes, own = rows(table, series="nodes"), rows(part, source=ASSEMBLED)
    grown = {name: column[part["edges"] > 0] for name, column in part.items()}
    grown = {name: column[grown["source"] != ASSEMBLED] for name, column in grown.items()}
    figure = new_figure(6.8, 4.4)
    axes = figure.subplots()
    _level(axes, nodes, style)
    draws = _random(axes, rows(table, series="random"), style)
    colour = style.palette.circuit
    axes.fill_between(grown["edges"], grown["low"], grown["high"], color=colour, alpha=0.18, linewidth=0)
    axes.plot(grown["edges"], grown["F"], "o-", color=colour, markersize=4, label="strongest edges")
    spread = np.maximum([own["F"] - own["low"], own["high"] - own["F"]], 0)
    look: dict[str, Any] = {
        "color": style.palette.complement,
        "markersize": 12,
        "zorder": 4,
        "elinewidth": 1.2,
    }
    axes.errorbar(own["edges"], own["F"], yerr=spread, fmt="*", label="the circuit's own edges", **look)
    _scales(axes, table)
    figure.legend(loc="outside upper left", ncols=4, columnspacing=1.2)
    outside = int(((table["F"] < LIMITS[0]) | (table["F"] > LIMITS[1])).sum())
    told = f" {outside} points lie outside the picture." if outside else ""
    said = {"n": int(table["n"].max()), "draws": draws, "ablation": table["ablation"][0], "outside": told}
    footnote(figure, NOTE.format(**said), style)
    return figure


def _level(axes: Axes, nodes: Table, style: Style) -> None:
    """F of the circuit by its nodes, and of the whole and the empty model."""
    for level in (0, 1):
        axes.axhline(level, color=style.palette.muted, linewidth=0.9, linestyle=":")
    if len(nodes["F"]):
        label = f"all {int(nodes['nodes'][0])} nodes, edges free"
        axes.axhspan(nodes["low"][0], nodes["high"][0], color=style.palette.train, alpha=0.12, linewidth=0)
        axes.axhline(nodes["F"][0], color=style.palette.train, linewidth=1.3, linestyle="--", label=label)


def _random(axes: Axes, part: Table, style: Style) -> int:
    sizes = np.unique(part["edges"])
    if not len(sizes):
        return 0
    drawn = [part["F"][part["edges"] == size] for size in sizes]
    middle = np.array([np.median(values) for values in drawn])
    spread = np.array(
        [[m - values.min(), values.max() - m] for m, values in zip(middle, drawn, strict=True)]
    ).T
    look: dict[str, Any] = {"color": style.palette.random, "markersize": 4, "elinewidth": 1.2}
    axes.errorbar(sizes, middle, yerr=spread, fmt="s", label="random edges", **look)
    return len(drawn[0])


def _scales(axes: Axes, table: Table) -> None:
    counts = table["edges"][table["edges"] > 0]
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if len(counts):
        axes.set_xlim(counts.min() / 1.25, counts.max() * 1.25)
    low, high = np.nanmin([table["F"], table["low"]]), np.nanmax([table["F"], table["high"]])
    axes.set_ylim(max(LIMITS[0], min(low, 0) - 0.06), min(LIMITS[1], max(high, 1) + 0.08))
    axes.set(xlabel="edges that carry anything", ylabel="F: share of the model's preference kept")
    grid(axes)

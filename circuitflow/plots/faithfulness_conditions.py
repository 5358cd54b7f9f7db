"""Figure: faithfulness under other conditions, and the areas CPR and CMD of every curve."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from circuitflow.jobs import Output
from circuitflow.plots.conditions import (
    ABLATIONS,
    ERRORS,
    Curve,
    by_ablation,
    by_errors,
    by_start,
    wanted_aggregate,
)
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, site_shades, style_of
from circuitflow.plots.tables import Table
from circuitflow.store.tables import read_table

COLOURS = ("#0f6e84", "#c1521f", "#6c4fa3", "#7a7f87", "#a07400")
MARKERS = "osDv^"
LIMITS = (-0.6, 1.6)
NOTE = (
    "n = {n} test prompts; {aggregate}; bands and whiskers: 95 % bootstrap intervals over prompts. Above: F of "
    "circuits of the strongest nodes; each panel changes one thing, the main condition is drawn in all. Below: areas "
    "under F (CPR, large is good) and under |1 − F| (CMD, small is good) over the share of nodes kept, linear, so "
    "that large circuits weigh most; in brackets the number of nodes of which shares are taken.{outside}"
)


def plot_faithfulness_conditions(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. F against node count by ablation, treatment of errors and start, and CPR and CMD of every curve.

    Inputs ``faithfulness``, ``areas`` (tables of evaluate_circuit); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    tables = [read_table(inputs[name]) for name in ("faithfulness", "areas")]
    with drawing(style):
        save(draw(tables[0], tables[1], style), out, style)


def draw(table: Table, areas: Table, style: Style) -> Figure:
    """The figure, from both tables."""
    wanted = wanted_aggregate(table)
    panels = {
        "Ablated nodes become": by_ablation(wanted),
        "Error nodes": by_errors(wanted),
        "First ablated site": by_start(wanted),
    }
    panels = {title: curves for title, curves in panels.items() if len(curves) > 1} or dict(
        list(panels.items())[:1]
    )
    labels = [label for label, _ in _area_rows(areas)]
    figure = new_figure(4.0 * max(len(panels), 2), 3.7 + 0.8 + 0.2 * len(labels))
    spec = figure.add_gridspec(2, 1, height_ratios=[3.2, 0.6 + 0.2 * len(labels)])
    above, below = spec[0].subgridspec(1, len(panels)), spec[1].subgridspec(1, 2)
    outside = 0
    for place, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(above[0, place])
        outside += _panel(axes, curves, style, by_depth=title.startswith("First"))
        axes.set_title(title)
        axes.set_ylabel("F" if place else "F: share of preference kept")
    for place, name in enumerate(("cpr", "cmd")):
        axes = figure.add_subplot(below[0, place])
        _areas(axes, areas, name, style)
        if place:
            axes.tick_params(labelleft=False)
    n, aggregate = int(table["n"].max()), str(wanted["aggregate"][0]).replace("_", " ")
    told = f" {outside} points lie outside the panels." if outside else ""
    footnote(figure, NOTE.format(n=n, aggregate=aggregate, outside=told), style)
    return figure


def _panel(axes: Axes, curves: Sequence[Curve], style: Style, by_depth: bool) -> int:
    """Curves of one panel; how many points lie outside."""
    shades = site_shades(len(curves)) if by_depth else COLOURS
    for level in (0, 1):
        axes.axhline(level, color=style.palette.muted, linewidth=0.9, linestyle=":", zorder=0)
    outside = 0
    for number, curve in enumerate(curves):
        part, colour = curve.table, shades[number % len(shades)]
        axes.fill_between(part["nodes"], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0)
        marker = MARKERS[number % len(MARKERS)]
        label = f"{curve.label} (main)" if curve.main else curve.label
        axes.plot(
            part["nodes"], part["F"], f"{marker}-", color=colour, markersize=3.2, linewidth=1.3, label=label
        )
        outside += int(((part["F"] < LIMITS[0]) | (part["F"] > LIMITS[1])).sum())
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    every = np.concatenate([curve.table["F"] for curve in curves])
    low, high = np.nanmin(every, initial=0), np.nanmax(every, initial=1)
    axes.set_ylim(max(LIMITS[0], low - 0.08), min(LIMITS[1], high + 0.4))
    axes.set_xlabel("nodes in the circuit")
    axes.legend(loc="upper left", fontsize=style.font_size * 0.78, handlelength=1.6)
    grid(axes)
    return outside


def _area_rows(areas: Table) -> list[tuple[str, int]]:
    """Curves by their label, and their rows in the table of areas."""
    chosen = areas["aggregate"] == areas["aggregate"][areas["main"]][0]
    first = int(np.flatnonzero(areas["main"])[0])
    usual = {name: areas[name][first] for name in ("ablation", "start", "errors")}
    found = []
    for row in np.flatnonzero(chosen & (areas["series"] != "complement")):
        differs = [name for name, value in usual.items() if areas[name][row] != value]
        if areas["series"][row] == "neurons":
            label = "neurons"
        elif not differs:
            label = "main condition"
        else:
            value = str(areas[differs[0]][row])
            label = {
                "ablation": f"ablation: {ABLATIONS.get(value, value)}",
                "start": f"from {value}",
                "errors": f"errors: {ERRORS.get(value, value)}",
            }[differs[0]]
        found.append((f"{label} (of {int(areas['candidates'][row]):,})", int(row)))
    return found


def _areas(axes: Axes, areas: Table, name: str, style: Style) -> None:
    listed = _area_rows(areas)
    index = np.array([row for _, row in listed])
    part = {key: column[index] for key, column in areas.items()}
    value, low, high = (part[f"{name}{end}"] for end in ("", "_low", "_high"))
    spread = np.nan_to_num(np.maximum([value - low, high - value], 0))
    place = np.arange(len(index))
    axes.errorbar(
        value, place, xerr=spread, fmt="o", color=style.palette.circuit, markersize=4.5, elinewidth=1.2
    )
    axes.set_yticks(place, [label for label, _ in listed])
    axes.set_ylim(len(index) - 0.4, -0.6)
    perfect = 1.0 if name == "cpr" else 0.0
    axes.axvline(perfect, color=style.palette.muted, linewidth=0.9, linestyle="--", zorder=0)
    axes.set_xlabel(f"{name.upper()} (whole model: about {perfect:.0f})")
    grid(axes, "x")

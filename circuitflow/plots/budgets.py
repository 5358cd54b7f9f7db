"""Figure: contenders at equal node budgets: faithfulness, paired differences, areas, overlap of their circuits."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.numbers import UNKNOWN, fixed
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_provenance, read_table

COLOURS = ("#0f6e84", "#c1521f", "#6c4fa3", "#7a7f87", "#a07400", "#1c2024", "#2166ac", "#b2182b")
MARKERS = "osDv^P<>"
LIMITS = (-0.6, 1.6)
NOTE = (
    "n = {n} test prompts. F(C) = (m(C) − m(∅)) / (m(M) − m(∅)) with the contender's strongest nodes; bands and "
    "bars: 95 % bootstrap intervals over prompts; differences {paired}. {ablated}{aggregate}.{differently} CPR: "
    "area under F over the share of the contender's own nodes, CMD: under |1 − F|. Circuits: Jaccard overlap of "
    "equally many nodes; where dictionaries differ, features that are each other's nearest by decoder direction "
    "count as the same; – : no nodes that can be compared.{outside}"
)


def plot_budgets(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Contenders side by side.

    Inputs ``comparison``, ``differences``, ``areas``, ``circuits`` (tables of compare_budgets); params ``style``,
    optionally ``ablation`` (for the footnote); outputs ``png``, ``svg``.
    """
    style = style_of(params)
    tables = {name: read_table(inputs[name]) for name in ("comparison", "differences", "areas", "circuits")}
    conventions = read_provenance(inputs["comparison"]).get("conventions", {})
    with drawing(style):
        save(draw(tables, conventions, style, params.get("ablation")), out, style)


def draw(
    tables: Mapping[str, Table], conventions: Mapping[str, Any], style: Style, ablation: str | None = None
) -> Figure:
    """The figure, from the four tables."""
    names = list(dict.fromkeys(map(str, tables["comparison"]["contender"])))
    looks = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }
    figure = new_figure(10.5, 8.6)
    spec = figure.add_gridspec(2, 1, height_ratios=[1.15, 1.0])
    pair = spec[0].subgridspec(1, 2)
    left, right = (figure.add_subplot(pair[column]) for column in range(2))
    curves, differences, areas = (tables[name] for name in ("comparison", "differences", "areas"))
    outside = _curves(left, curves, names, looks, style)
    _differences(right, differences, names, looks, style)
    cells = spec[1].subgridspec(1, 3, width_ratios=[1, 1, 1.35])
    for place, (what, title) in enumerate((("cpr", "CPR (large is good)"), ("cmd", "CMD (small is good)"))):
        axes = figure.add_subplot(cells[place])
        _areas(axes, areas, names, looks, what)
        axes.set_title(title)
        if place:
            axes.tick_params(labelleft=False)
    _overlaps(figure.add_subplot(cells[2]), tables["circuits"], names, style)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(names)), columnspacing=1.4)
    footnote(figure, _note(tables, conventions, ablation, outside), style)
    return figure


def _note(
    tables: Mapping[str, Table], conventions: Mapping[str, Any], ablation: str | None, outside: int
) -> str:
    sizes = sorted(set(map(int, tables["comparison"]["n"])))
    differently: Mapping[str, str] = conventions.get("differently") or {}
    paired = tables["differences"].get("paired", np.ones(1, bool))
    return NOTE.format(
        n="–".join(map(str, sorted({sizes[0], sizes[-1]}))),
        paired="are paired by prompt"
        if np.all(paired)
        else "are paired where prompts and ablation are the same",
        ablated=f"Ablation: {ablation}; " if ablation else "",
        aggregate=str(conventions.get("aggregate", "ratio_of_means")).replace("_", " "),
        differently="".join(f" {name}: {under}." for name, under in differently.items()),
        outside=f" {outside} points lie outside the picture." if outside else "",
    )


def _curves(axes: Axes, table: Table, names: Sequence[str], looks: Mapping[str, Any], style: Style) -> int:
    for level in (0, 1):
        axes.axhline(level, color=style.palette.muted, linewidth=0.9, linestyle=":")
    for name in names:
        part = rows(table, contender=name)
        look = looks[name]
        axes.fill_between(
            part["nodes"], part["low"], part["high"], color=look["color"], alpha=0.14, linewidth=0
        )
        axes.plot(part["nodes"], part["F"], markersize=3.6, linewidth=1.3, label=name, **look)
    log_axis(axes, "x", table["nodes"])
    low, high = np.nanmin(table["F"]), np.nanmax(table["F"])
    axes.set_ylim(max(LIMITS[0], min(low, 0) - 0.06), min(LIMITS[1], max(high, 1) + 0.08))
    axes.set(xlabel="nodes", ylabel="F: share of the model's preference kept", title="Faithfulness")
    grid(axes)
    return int(((table["F"] < LIMITS[0]) | (table["F"] > LIMITS[1])).sum())


def _differences(
    axes: Axes, table: Table, names: Sequence[str], looks: Mapping[str, Any], style: Style
) -> None:
    axes.axhline(0, color=style.palette.muted, linewidth=0.9, linestyle=":")
    others = [name for name in names[1:] if len(table) and (table["contender"] == name).any()]
    for order, name in enumerate(others):
        part = rows(table, contender=name)
        shift = 1.035 ** (order - (len(others) - 1) / 2)
        spread = np.maximum([part["difference"] - part["low"], part["high"] - part["difference"]], 0)
        look = {"markersize": 3.8, "elinewidth": 1.0, "linewidth": 0.7, **looks[name]}
        axes.errorbar(part["nodes"] * shift, part["difference"], yerr=spread, **look)
    if others:
        log_axis(axes, "x", table["nodes"])
        size = float(np.nanmax(np.abs([table["low"], table["high"]])))
        axes.set_ylim(-min(size, 2) * 1.08, min(size, 2) * 1.08)
    axes.set(xlabel="nodes", ylabel="difference of F", title=f"Against {names[0]}, at equal budgets")
    grid(axes)


def _areas(axes: Axes, table: Table, names: Sequence[str], looks: Mapping[str, Any], what: str) -> None:
    for height, name in enumerate(reversed(names)):
        part = rows(table, contender=name)
        if not len(part[what]):
            continue
        value, low, high = (float(part[f"{what}{end}"][0]) for end in ("", "_low", "_high"))
        spread = [[max(value - low, 0)], [max(high - value, 0)]]
        look = {"markersize": 5, "elinewidth": 1.2, "linestyle": "", **looks[name]}
        axes.errorbar(value, height, xerr=spread, **look)
        axes.annotate(
            fixed(value), (value, height), (0, 6), textcoords="offset points", ha="center", fontsize="small"
        )
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.margins(x=0.15)
    grid(axes, "x")


def _overlaps(axes: Axes, table: Table, names: Sequence[str], style: Style) -> None:
    """Jaccard overlap of every two circuits, above the diagonal their agreement of scores."""
    n = len(names)
    shown = np.full((n, n), np.nan)
    place = {name: i for i, name in enumerate(names)}
    part = rows(table, site="all")
    for a, b, value in zip(part["a"], part["b"], part["jaccard"], strict=True):
        shown[place[str(b)], place[str(a)]] = shown[place[str(a)], place[str(b)]] = value
    axes.imshow(np.nan_to_num(shown), cmap="BuGn", vmin=0, vmax=1, alpha=np.isfinite(shown).astype(float))
    for row in range(n):
        for column in range(n):
            value = shown[row, column]
            if row != column:
                colour = style.palette.paper if np.nan_to_num(value) > 0.6 else style.palette.text
                text = fixed(value) if np.isfinite(value) else UNKNOWN
                axes.text(column, row, text, ha="center", va="center", color=colour)
    axes.set_xticks(range(n), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n), names)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    sizes = sorted(set(part["nodes_a"][np.isfinite(part["nodes_a"])].astype(int).tolist()))
    axes.set_title("Jaccard overlap" + (f" of {sizes[-1]} nodes" if sizes else ""))

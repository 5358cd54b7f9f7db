"""Figure: how much of the effect runs through each site, in its features and in its error."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, pair_counts, rows, unit_of
from circuitflow.store.tables import read_table

MARKERS = {"features": "o", "error": "^"}
COLOURS = {"features": "feature", "error": "error"}
SHIFT = {
    ("features", "train"): -0.18,
    ("features", "test"): -0.06,
    ("error", "train"): 0.06,
    ("error", "test"): 0.18,
}
BESIDE = 8
"""Sites up to which the panels stand side by side."""
NOTE = (
    "{first}: Σ of the nodes' indirect effects; IE > 0 supports the clean answer. {second}: Σ of their sizes, "
    "which does not cancel. Bars: 95 % bootstrap intervals over pairs. n = {n}."
)


def plot_layer_importance(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Summed node scores of each site, features and error apart, on both splits.

    Input ``layers`` (table of rank_features); params ``style``, optionally ``metric``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        figure = draw(read_table(inputs["layers"]), style, unit_of(params.get("metric")))
        save(figure, out, style)


def draw(layers: Table, style: Style, unit: str = "logits") -> Figure:
    """The figure, from the table of layers."""
    sites = in_depth_order(layers["site"])
    beside = len(sites) <= BESIDE
    figure = new_figure(
        *((max(7.2, 2.4 + 0.9 * len(sites)), 3.3) if beside else (1.6 + 0.32 * len(sites), 6))
    )
    total, size = figure.subplots(*((1, 2) if beside else (2, 1)))
    _panel(total, layers, sites, "", style)
    _panel(size, layers, sites, "_abs", style)
    total.set(title="Effect through each site", ylabel=f"Σ IE ({unit})")
    size.set(title="Size of the effects", ylabel=f"Σ |IE| ({unit})")
    size.set_ylim(bottom=-0.03 * size.get_ylim()[1])  # markers at 0 stay whole
    for axes in (total, size):
        axes.axhline(0, color=style.palette.muted, linewidth=0.8)
    figure.legend(handles=_legend(style), loc="outside upper right", ncols=4, handletextpad=0.3)
    first, second = ("Left", "Right") if beside else ("Above", "Below")
    footnote(figure, NOTE.format(first=first, second=second, n=pair_counts(layers)), style)
    return figure


def _panel(axes: Axes, table: Table, sites: Sequence[str], suffix: str, style: Style) -> None:
    for (kind, split), shift in SHIFT.items():
        part = rows(table, split=split)
        place = np.array([sites.index(site) for site in part["site"]])
        name = kind + suffix
        value, low, high = (part[column] for column in (name, f"{name}_low", f"{name}_high"))
        colour = getattr(style.palette, COLOURS[kind])
        axes.errorbar(
            place + shift,
            value,
            yerr=np.maximum([value - low, high - value], 0),
            fmt=MARKERS[kind],
            color=colour,
            markerfacecolor=colour if split == "train" else style.palette.paper,
            markersize=5,
            elinewidth=1,
            capsize=2,
        )
    axes.set_xticks(
        range(len(sites)), sites, rotation=0 if len(sites) <= 6 else 45 if len(sites) <= BESIDE else 90
    )
    axes.set_xlim(-0.6, len(sites) - 0.4)
    grid(axes)


def _legend(style: Style) -> list[Line2D]:
    return [
        Line2D(
            [],
            [],
            linestyle="",
            marker=MARKERS[kind],
            color=(colour := getattr(style.palette, COLOURS[kind])),
            markerfacecolor=colour if split == "train" else style.palette.paper,
            label=f"{kind}, {split}",
        )
        for kind, split in SHIFT
    ]

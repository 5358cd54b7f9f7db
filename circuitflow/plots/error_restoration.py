"""Figure: how far restored features make up for ablated errors, by range of layers and number of features."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.models.sites import depth_order, parse_site
from circuitflow.plots.error_series import (
    LIMITS,
    faithfulness_axis,
    figure_of_experiments,
    layers,
    notes,
    places,
    series,
    window_names,
)
from circuitflow.plots.style import Style, footnote, new_figure, site_shades
from circuitflow.plots.tables import Table, rows

NOTE = (
    " Restored: the K strongest features of every site of the range (by score on train pairs) are held at their clean "
    "values."
)


def plot_error_restoration(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. F against the range in which features are restored, one line per number of features.

    Input ``experiments`` (table of ablate_error_nodes); params ``style``; outputs ``png``, ``svg``.
    """
    figure_of_experiments(inputs, params, out, draw)


def draw(table: Table, facts: Mapping[str, Any], style: Style) -> Figure:
    """The figure, from the table of experiments."""
    part = rows(table, experiment="restore")
    names = list(dict.fromkeys(window_names(part, "restored_")))
    figure = new_figure(max(7.0, 3 + 0.62 * len(names)), 3.9)
    axes = figure.subplots()
    _unrestored(axes, rows(part, k=0), style)
    counts = [int(k) for k in np.unique(part["k"]) if k]
    for order, (k, shade) in enumerate(zip(counts, site_shades(len(counts)), strict=True)):
        here = rows(part, k=k)
        x = np.array([names.index(name) for name in window_names(here, "restored_")], float)
        shift = 0.55 * ((order + 0.5) / len(counts) - 0.5)
        series(axes, x + shift, here, fmt="o", color=shade, label=f"K = {k}")
        for run in _runs(here):
            axes.plot(x[run] + shift, np.clip(here["F"][run], *LIMITS), color=shade, linewidth=0.9)
    bound = layers(str(part["first"][0]), str(part["last"][0])) if len(part["F"]) else "–"
    places(axes, names, f"layers whose top K features are restored (errors of layers {bound} ablated)")
    faithfulness_axis(axes, part, style, "F: share of the model's preference kept")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="features per site", alignment="left")
    footnote(figure, notes(part, facts) + NOTE, style)
    return figure


def _runs(part: Table) -> list[np.ndarray]:
    """Rows to be joined by a line: ranges that move on from layer to layer, not the range of all layers beside them."""
    depth = np.array([depth_order(parse_site(site)) for site in part["restored_first"]])
    breaks = np.flatnonzero(np.array([tuple(a) > tuple(b) for a, b in pairwise(depth.tolist())], bool)) + 1
    return np.split(np.arange(len(depth)), breaks)


def _unrestored(axes: Any, part: Table, style: Style) -> None:
    """F with the errors ablated and nothing restored: the same for every range."""
    if not len(part["F"]):
        return
    colour = style.palette.error
    axes.axhspan(part["low"][0], part["high"][0], color=colour, alpha=0.13, linewidth=0)
    axes.axhline(part["F"][0], color=colour, linewidth=1.2, linestyle="--", label="none restored")

"""Figure: a map of one variant's features, by the directions that they write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from circuitflow.jobs import Output
from circuitflow.plots.clusters import (
    DENSITY,
    MANY,
    cluster_points,
    clusters_told,
    dot_size,
    without_ticks,
    write_apart,
)
from circuitflow.plots.numbers import whole
from circuitflow.plots.scales import power
from circuitflow.plots.style import Style, drawing, footnote, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import say
from circuitflow.store.tables import read_table

NAMED = 12  # features that get their number, the most important first
NOTE = (
    "UMAP of decoder rows by cosine: neighbours on the map write similar directions; axes and distances "
    "between clusters mean nothing. One dot per feature that is active on held-out tokens: {shown} of {all}. "
    "Left: HDBSCAN of the map: {clusters} (grey). Right: log₁₀ of the density, the share of held-out tokens "
    "on which a feature is active; rings: the {named} features whose removal costs most."
)


def plot_variant_map(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. UMAP of decoder directions, by cluster and by density.

    Input ``features`` (table of study_features); params ``style``, ``variant`` and ``site`` (for the title); outputs
    ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(
            draw(read_table(inputs["features"]), f"{params['variant']} · {params['site']}", style), out, style
        )


def draw(features: Table, title: str, style: Style) -> Figure:
    """The figure, from the table of features; those without a place on the map are counted only."""
    figure = new_figure(7.8, 4.4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=style.font_size * 1.1, fontweight="bold")
    left, right = figure.subplots(1, 2)
    placed = np.isfinite(features["map_x"]) & np.isfinite(features["map_y"])
    shown = {name: column[placed] for name, column in features.items()}
    left.set_title("Clusters of decoder directions")
    right.set_title("How often they fire")
    named = 0
    if placed.any():
        cluster_points(left, shown["map_x"], shown["map_y"], shown["cluster"], style)
        _density(right, shown)
        named = _name(right, shown, style)
    else:
        for axes in (left, right):
            say(axes, "no feature is on the map", style)
    without_ticks(left)
    without_ticks(right)
    counts = {
        "clusters": clusters_told(shown["cluster"]),
        "shown": whole(int(placed.sum())),
        "all": whole(len(placed)),
        "named": named,
    }
    footnote(figure, NOTE.format(**counts), style)
    return figure


def _density(axes: Axes, features: Table) -> None:
    logs = np.log10(np.maximum(features["density"], 1e-12))
    order = np.argsort(logs, kind="stable")
    points = axes.scatter(
        features["map_x"][order],
        features["map_y"][order],
        s=dot_size(len(logs)),
        c=logs[order],
        cmap=DENSITY,
        vmin=float(np.percentile(logs, 1)),
        vmax=float(np.percentile(logs, 99)) + 1e-9,
        linewidths=0,
        rasterized=len(logs) > MANY,
    )
    assert axes.figure is not None
    bar = axes.figure.colorbar(points, ax=axes, label="density", shrink=0.8, extend="both")
    bar.locator = MaxNLocator(4, integer=True)
    bar.formatter = FuncFormatter(lambda value, _: power(value))
    bar.update_ticks()


def _name(axes: Axes, features: Table, style: Style) -> int:
    known = np.flatnonzero(np.isfinite(features["importance"]))
    chosen = known[np.argsort(-features["importance"][known], kind="stable")][:NAMED]
    x, y = features["map_x"][chosen], features["map_y"][chosen]
    axes.scatter(x, y, s=30, facecolors="none", edgecolors=style.palette.negative, linewidths=0.9)
    numbers = [str(int(number)) for number in features["feature"][chosen]]
    write_apart(axes, list(zip(x, y, strict=True)), numbers, style)
    return len(chosen)

"""Figure: which of one variant's most important features fire together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.numbers import fixed
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import say
from circuitflow.store.tables import read_table

PAIRS = 16
CELL = 0.128  # inches
NOTE = (
    "Pearson's correlation of activations over held-out tokens, outliers left out, zeros included; the "
    "{count} most important features, ordered so that those which fire together stand together (average "
    "linkage). Right: all {all} pairs, and the {pairs} with the largest |r|."
)


def plot_variant_correlation(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Correlations of the most important features' activations.

    Input ``correlation`` (table of study_features); params ``style``, ``variant`` and ``site`` (for the title);
    outputs ``png``, ``svg``.
    """
    style = style_of(params)
    title = f"{params['variant']} · {params['site']}"
    with drawing(style):
        save(draw(read_table(inputs["correlation"]), title, style), out, style)


def draw(correlation: Table, title: str, style: Style) -> Figure:
    """The figure, from the table of correlations."""
    numbers, matrix = square(correlation)
    side = max(2.6, CELL * len(numbers))
    figure = new_figure(side + 3.4, side + 1.6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=style.font_size * 1.1, fontweight="bold")
    if len(numbers) < 2:
        say(figure.subplots(), "fewer than two features are active on held-out tokens", style)
        return figure
    columns = figure.add_gridspec(1, 2, width_ratios=(side + 0.9, 2.5))
    order = linkage_order(matrix)
    _matrix(
        figure.add_subplot(columns[0]),
        matrix[np.ix_(order, order)],
        [numbers[place] for place in order],
        style,
    )
    above, below = columns[1].subgridspec(2, 1, height_ratios=(0.8, 1.6)).subplots(squeeze=False)[:, 0]
    pairs = ranked_pairs(matrix)
    _histogram(above, matrix, style)
    _strongest(below, pairs[:PAIRS], numbers, matrix, style)
    footnote(figure, NOTE.format(count=len(numbers), all=len(pairs), pairs=min(PAIRS, len(pairs))), style)
    return figure


def square(correlation: Table) -> tuple[list[int], np.ndarray]:
    """Feature numbers in the table's order, and the (features, features) matrix, NaN where nothing is known."""
    numbers = list(dict.fromkeys(int(feature) for feature in correlation["feature_a"]))
    place = {number: row for row, number in enumerate(numbers)}
    matrix = np.full((len(numbers), len(numbers)), np.nan)
    for a, b, value in zip(
        *(correlation[name].tolist() for name in ("feature_a", "feature_b", "correlation")), strict=True
    ):
        matrix[place[a], place[b]] = value
    return numbers, matrix


def linkage_order(matrix: np.ndarray) -> list[int]:
    """Order of rows by average linkage: the two groups of largest mean correlation join, similar ends together."""
    similar = np.nan_to_num(matrix, nan=-1.0)
    groups = [[row] for row in range(len(similar))]
    while len(groups) > 1:
        means = np.array([[similar[np.ix_(a, b)].mean() for b in groups] for a in groups])
        np.fill_diagonal(means, -np.inf)
        first, second = sorted(divmod(int(means.argmax()), len(groups)))
        a, b = groups[first], groups.pop(second)
        ways = [(x, y) for x in (a, a[::-1]) for y in (b, b[::-1])]
        best = max(ways, key=lambda way: similar[way[0][-1], way[1][0]])
        groups[first] = [*best[0], *best[1]]
    return groups[0] if groups else []


def ranked_pairs(matrix: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of rows with a known correlation, the largest in size first."""
    rows, columns = np.triu_indices(len(matrix), 1)
    known = np.isfinite(matrix[rows, columns])
    rows, columns = rows[known], columns[known]
    order = np.argsort(-np.abs(matrix[rows, columns]), kind="stable")
    return [(int(rows[place]), int(columns[place])) for place in order]


def _matrix(axes: Axes, matrix: np.ndarray, numbers: list[int], style: Style) -> None:
    palette = style.palette
    ends = LinearSegmentedColormap.from_list("r", [palette.negative, palette.paper, palette.positive])
    colours = ends.with_extremes(bad=palette.grid)
    shown = matrix.copy()
    np.fill_diagonal(shown, np.nan)
    image = axes.imshow(shown, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
    names, size = [f"#{number}" for number in numbers], max(7.0, style.font_size * 0.78)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0, pad=2)
    axes.set_title("Correlation of activations")
    assert axes.figure is not None
    label = "Pearson's r (grey: itself, or never active)"
    axes.figure.colorbar(image, ax=axes, location="bottom", label=label, shrink=0.5, aspect=30, pad=0.01)


def _histogram(axes: Axes, matrix: np.ndarray, style: Style) -> None:
    values = matrix[np.triu_indices(len(matrix), 1)]
    axes.hist(
        values[np.isfinite(values)], bins=np.arange(-1, 1.01, 0.05).tolist(), color=style.palette.random
    )
    axes.set(title="All pairs", xlabel="r", ylabel="pairs", xlim=(-1, 1))
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    grid(axes)


def _strongest(
    axes: Axes, pairs: list[tuple[int, int]], numbers: list[int], matrix: np.ndarray, style: Style
) -> None:
    axes.set(title="Strongest pairs", xlabel="r", xlim=(-1, 1))
    palette = style.palette
    for row, (a, b) in enumerate(pairs):
        r = float(matrix[a, b])
        axes.barh([row], [r], height=0.7, color=palette.positive if r >= 0 else palette.negative, alpha=0.85)
        side = "right" if r >= 0 else "left"
        axes.text(
            -0.03 if r >= 0 else 0.03, row, fixed(r), ha=side, va="center", fontsize=style.font_size * 0.8
        )
    axes.set_yticks(range(len(pairs)), [f"#{numbers[a]} · #{numbers[b]}" for a, b in pairs])
    axes.set_ylim(max(len(pairs), 4) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    grid(axes, "x")
    axes.tick_params(axis="y", length=0)

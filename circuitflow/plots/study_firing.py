"""Figure: how often the features of a study's variants fire, how steadily, and since when."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from circuitflow.jobs import Output
from circuitflow.plots.numbers import whole
from circuitflow.plots.scales import log_axis, power, token_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import (
    Variant,
    alive,
    curve,
    followed,
    legend,
    looks,
    name_rows,
    read_variants,
    rows_height,
    say,
    shade_groups,
)

OFTEN = 0.1
"""Density above which a feature counts as firing often."""
BIN = 1 / 3  # decades: the step from one token to two, 0.30, leaves none empty
BANDS = 4  # quartiles of more variants than these would hide each other
QUARTERS = ("density_q1", "density_q2", "density_q3", "density_q4")
NOTE = (
    "Density: share of held-out tokens, outliers left out, on which a feature is active. Histograms: over "
    "log₁₀ density of the n features that are active at all, each scaled to its own peak; bar and dot: "
    "quartiles and median. Firing often: density above {often} (filled); silent: never active on held-out "
    "tokens (open). Steadiness: Spearman's correlation of the features' densities between two quarters of the "
    "held-out text; dot: mean of the six pairs, line: smallest to largest. Below: the same during training, "
    "measured at the checkpoints; thin lines: further seeds; bands, of up to {bands} variants: quartiles of "
    "the first seed."
)


def plot_study_firing(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Densities of features, those that fire often or never, steadiness, and the trend in training.

    Inputs ``features`` and ``checkpoints`` (lists of tables of study_features, each in the folder of its
    variant); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    features, checkpoints = read_variants(inputs["features"]), read_variants(inputs["checkpoints"])
    with drawing(style):
        save(draw(features, checkpoints, style), out, style)


def draw(features: Mapping[str, Table], checkpoints: Mapping[str, Table], style: Style) -> Figure:
    """The figure, from tables of features and of checkpoints by variant."""
    labels = list(features)
    shown = followed(checkpoints)
    groups = len({Variant.of(label).group for label in shown})
    above, below = 0.7 + rows_height(len(labels)), max(2.0, 0.5 + 0.165 * groups)
    figure = new_figure(8.0, above + below + 1.3)
    parts = figure.add_gridspec(2, 1, height_ratios=(above, below))
    panels = parts[0].subgridspec(1, 3, width_ratios=(2.2, 1.2, 1.2)).subplots(sharey=True, squeeze=False)[0]
    _histograms(panels[0], features, style)
    _shares(panels[1], features, style)
    _steadiness(panels[2], features, style)
    counts = {label: f"n {whole(int(alive(table).sum()))}" for label, table in features.items()}
    name_rows(panels, labels, counts)
    left, right, keys = parts[1].subgridspec(1, 3, width_ratios=(2, 2, 1.2)).subplots(squeeze=False)[0]
    _trend(left, shown, style)
    _often(right, shown, style)
    keys.set_axis_off()
    legend(keys, list(shown))
    footnote(figure, NOTE.format(often=OFTEN, bands=BANDS), style)
    return figure


def steadiness(features: Table) -> list[float]:
    """Spearman's correlations of density between each two quarters of the text, over features active in the text."""
    ranks = [_ranks(np.asarray(features[name], float)[alive(features)]) for name in QUARTERS]
    known = [rank for rank in ranks if len(rank) > 2 and np.isfinite(rank).all() and rank.std() > 0]
    return [float(np.corrcoef(a, b)[0, 1]) for a, b in combinations(known, 2)]


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs; NaN stays NaN."""
    if not np.isfinite(values).all():
        return np.full(len(values), np.nan)
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def _histograms(axes: Axes, features: Mapping[str, Table], style: Style) -> None:
    axes.set(title="How often features fire", xlabel="density (share of held-out tokens)")
    shade_groups(axes, list(features), style)
    logs = {label: np.log10(table["density"][alive(table)]) for label, table in features.items()}
    everything = np.concatenate(list(logs.values()))
    if not len(everything):
        say(axes, "no feature is active", style)
        return
    edges = np.arange(np.floor(everything.min() / BIN) * BIN, BIN / 2, BIN)
    for row, (label, look) in enumerate(looks(features).items()):
        counts = np.histogram(logs[label], np.append(edges, BIN))[0]
        if not counts.sum():
            continue
        height = np.repeat(counts / counts.max() * 0.82, 2)
        x = np.repeat(np.append(edges, BIN), 2)[1:-1]
        base = row + 0.42
        axes.fill_between(x, base, base - height, color=look.colour, alpha=0.35, linewidth=0)
        axes.plot(x, base - height, color=look.colour, linewidth=0.7)
        p25, p50, p75 = np.percentile(logs[label], (25, 50, 75))
        axes.plot([p25, p75], [base, base], color=look.colour, linewidth=2.6, solid_capstyle="butt")
        axes.plot(
            [p50], [base], "o", color=look.colour, markersize=4, markeredgecolor="white", markeredgewidth=0.6
        )
    axes.axvline(np.log10(OFTEN), color=style.palette.muted, linewidth=0.8, linestyle=":")
    axes.set_xlim(edges[0] - BIN, BIN)
    axes.set_xticks(np.arange(np.ceil(edges[0]), 1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    grid(axes, "x")


def _shares(axes: Axes, features: Mapping[str, Table], style: Style) -> None:
    axes.set(title="Often and never", xlabel=f"share: ● > {OFTEN}   ○ silent")
    shade_groups(axes, list(features), style)
    for row, (label, look) in enumerate(looks(features).items()):
        density = np.asarray(features[label]["density"])
        often, never = float(np.mean(density > OFTEN)), float(np.mean(density == 0))
        axes.plot([often, never], [row, row], color=look.colour, linewidth=0.7, alpha=0.5)
        axes.plot([often], [row], "o", color=look.colour, markersize=4.5)
        axes.plot([never], [row], "o", markerfacecolor="white", markeredgecolor=look.colour, markersize=4.5)
    axes.set_xlim(-0.02, None)
    grid(axes, "x")


def _steadiness(axes: Axes, features: Mapping[str, Table], style: Style) -> None:
    axes.set(title="Steadiness", xlabel="rank correlation")
    shade_groups(axes, list(features), style)
    lowest = 0.9
    for row, (label, look) in enumerate(looks(features).items()):
        pairs = steadiness(features[label])
        if pairs:
            axes.plot([min(pairs), max(pairs)], [row, row], color=look.colour, linewidth=1.1)
            axes.plot([np.mean(pairs)], [row], look.mark, color=look.colour, markersize=4.2)
            lowest = min(lowest, *pairs)
    axes.set_xlim(lowest - 0.05, 1.01)
    grid(axes, "x")


def _trend(axes: Axes, checkpoints: Mapping[str, Table], style: Style) -> None:
    axes.set(title="Density during training", ylabel="median density")
    if not checkpoints:
        say(axes, "no variant has checkpoints", style)
        return
    values = []
    found = looks(checkpoints)
    banded = sum(look.first for look in found.values()) <= BANDS
    for label, look in found.items():
        table = checkpoints[label]
        curve(axes, table["tokens"], table["density_p50"], look, marks=True)
        values.append(table["density_p50"])
        if look.first and banded:
            bounds = table["density_p25"], table["density_p75"]
            axes.fill_between(table["tokens"], *bounds, color=look.colour, alpha=0.13, linewidth=0)
            values += bounds
    log_axis(axes, "y", np.concatenate(values))
    token_axis(axes)
    grid(axes)


def _often(axes: Axes, checkpoints: Mapping[str, Table], style: Style) -> None:
    axes.set(title="Firing often, during training", ylabel=f"share with density > {OFTEN}")
    if not checkpoints:
        say(axes, "no variant has checkpoints", style)
        return
    for label, look in looks(checkpoints).items():
        table = checkpoints[label]
        curve(axes, table["tokens"], table["high_frequency_share"], look, marks=True)
    highest = max(
        float(np.nanmax(table["high_frequency_share"], initial=0)) for table in checkpoints.values()
    )
    axes.set_ylim(0, highest * 1.12 or 1.0)
    token_axis(axes)
    grid(axes)

"""Figure: what one variant's most important features do along a stretch of held-out text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from circuitflow.jobs import Output
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import (
    Style,
    drawing,
    fitting,
    footnote,
    grid,
    new_figure,
    save,
    shown,
    style_of,
)
from circuitflow.plots.tables import Table
from circuitflow.plots.variants import say
from circuitflow.store.tables import read_table

ROW, COLUMN = 0.132, 0.112  # inches
WORD = 0.85  # inches of a token's text
NOTE = (
    "Rows: the {rows} most important features, the most important on top; columns: consecutive tokens of a "
    "held-out block, which no dictionary was trained on (· is a space, ↵ a line break). Colour: activation as "
    "a share of the feature's own largest activation over all held-out tokens; white: inactive. Top: how many "
    "of these features are active. Right: importance, by how much FVU grows when the feature alone is removed."
)


def plot_variant_heatmap(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Activations of the most important features, token by token.

    Inputs ``heatmap`` and ``features`` (tables of study_features); params ``style``, ``variant`` and ``site``
    (for the title); outputs ``png``, ``svg``.
    """
    style = style_of(params)
    title = f"{params['variant']} · {params['site']}"
    with drawing(style):
        save(draw(read_table(inputs["heatmap"]), read_table(inputs["features"]), title, style), out, style)


def draw(heatmap: Table, features: Table, title: str, style: Style) -> Figure:
    """The figure, from the tables of the heat map (features in order of rank) and of features."""
    numbers = list(dict.fromkeys(int(feature) for feature in heatmap["feature"]))
    places = list(dict.fromkeys(zip(heatmap["block"].tolist(), heatmap["position"].tolist(), strict=True)))
    if not numbers:
        figure = new_figure(6.0, 2.0)
        say(figure.subplots(), "no feature is active on held-out tokens", style)
        return figure
    width, height = max(3.2, COLUMN * len(places)), max(1.0, ROW * len(numbers))
    figure = new_figure(width + 1.9, height + WORD + 1.7)
    figure.suptitle(title, x=0.01, ha="left", fontsize=style.font_size * 1.1, fontweight="bold")
    panels = figure.subplots(2, 2, width_ratios=(width, 0.85), height_ratios=(0.42, height), squeeze=False)
    panels[0, 1].set_axis_off()
    share = shares(heatmap, features, numbers, places)
    _cells(panels[1, 0], share, style)
    _name_cells(panels[1, 0], heatmap, numbers, len(places), style)
    _counts(panels[0, 0], share, style)
    _importance(panels[1, 1], features, numbers, style)
    footnote(figure, NOTE.format(rows=len(numbers)), style)
    return figure


def shares(heatmap: Table, features: Table, numbers: list[int], places: list[tuple[int, int]]) -> np.ndarray:
    """(features, tokens): activation over the feature's largest activation on held-out tokens."""
    row = {number: place for place, number in enumerate(numbers)}
    column = {place: index for index, place in enumerate(places)}
    largest = dict(zip(features["feature"].tolist(), features["max_value"].tolist(), strict=True))
    cells = np.zeros((len(numbers), len(places)))
    for feature, block, position, value in zip(
        *(heatmap[name].tolist() for name in ("feature", "block", "position", "value")), strict=True
    ):
        top = largest.get(feature, 0.0)
        cells[row[feature], column[block, position]] = abs(value) / top if top > 0 else 0.0
    return cells


def _cells(axes: Axes, share: np.ndarray, style: Style) -> None:
    colours = LinearSegmentedColormap.from_list("activation", [style.palette.paper, "#9cc3d9", "#123a5e"])
    image = axes.imshow(share, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(share.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(share.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=style.palette.grid, linewidth=0.3)
    axes.tick_params(which="minor", length=0)
    assert axes.figure is not None
    bar = axes.figure.colorbar(
        image, ax=axes, location="bottom", shrink=0.35, aspect=30, anchor=(0, 1), pad=0.01
    )
    bar.set_label("activation / largest on held-out tokens", loc="left")
    bar.locator = MaxNLocator(2)
    bar.update_ticks()


def _name_cells(axes: Axes, heatmap: Table, numbers: list[int], columns: int, style: Style) -> None:
    size = max(7.0, style.font_size * 0.78)
    words = [fitting(word, WORD, size) for word in shown(heatmap["token"][:columns])]
    axes.set_xticks(range(columns), words, rotation=90, fontsize=size)
    axes.set_yticks(range(len(numbers)), [f"#{number}" for number in numbers], fontsize=size)
    axes.tick_params(which="major", length=0, pad=2)
    axes.set_ylabel("feature")


def _counts(axes: Axes, share: np.ndarray, style: Style) -> None:
    counts = (share > 0).sum(axis=0)
    axes.bar(np.arange(len(counts)), counts, width=0.8, color=style.palette.random)
    axes.set(
        xlim=(-0.5, len(counts) - 0.5),
        xticks=[],
        ylabel="active",
        title="The most important features, token by token",
    )
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    grid(axes)


def _importance(axes: Axes, features: Table, numbers: list[int], style: Style) -> None:
    known = dict(zip(features["feature"].tolist(), features["importance"].tolist(), strict=True))
    values = np.array([known.get(number, np.nan) for number in numbers])
    axes.plot(values, np.arange(len(numbers)), "o", color=style.palette.feature, markersize=3.2)
    axes.set(ylim=(len(numbers) - 0.5, -0.5), yticks=[], xlabel="importance")
    log_axis(axes, "x", values)
    grid(axes, "x")
    axes.tick_params(axis="x", rotation=60)

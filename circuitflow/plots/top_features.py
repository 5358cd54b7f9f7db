"""Figure: the nodes with the largest effects, and the tokens they fire on."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from circuitflow.data.proportions import Z95
from circuitflow.features.descriptions import Descriptions, fires_on, promotes, read_descriptions
from circuitflow.jobs import Output
from circuitflow.plots.style import (
    Style,
    as_many_as_fit,
    drawing,
    footnote,
    grid,
    new_figure,
    save,
    shown,
    style_of,
)
from circuitflow.plots.tables import Table, node_name, top_nodes, unit_of
from circuitflow.store.tables import read_table

ROW = 0.235  # inches
IN_TEXT, IN_TASK, PROMOTES = "fires on, in text", "fires on, in the task", "promotes"
COLUMNS = ((IN_TEXT, 1.9), (IN_TASK, 1.75), (PROMOTES, 1.75))  # widths in inches
NOTE = (
    "Nodes chosen by |IE| on the training pairs; bars: IE on the test pairs with 95 % intervals (± 1.96 "
    "standard errors), ticks: IE on the training pairs. IE > 0: the node's clean value supports the clean"
    " answer. · is a space, ↵ a line break."
)


def plot_top_features(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Scores of the top nodes of all sites with the tokens they fire on and promote.

    Inputs ``nodes`` (table of rank_features), ``features`` (list of descriptions); params ``style``, ``top``,
    optionally ``metric`` (for the unit);
    outputs ``png``, ``svg``.
    """
    style = style_of(params)
    nodes = top_nodes(read_table(inputs["nodes"]), int(params["top"]))
    descriptions = read_descriptions(inputs["features"])
    with drawing(style):
        save(draw(nodes, descriptions, style, unit_of(params.get("metric"))), out, style)


def draw(nodes: Table, descriptions: Descriptions, style: Style, unit: str = "logits") -> Figure:
    """The figure, one row per row of ``nodes``."""
    texts = sum(width for _, width in COLUMNS)
    figure = new_figure(4.4 + texts, 1.3 + ROW * len(nodes["site"]))
    bars, words = figure.subplots(1, 2, sharey=True, width_ratios=(2.7, texts))
    _bars(bars, nodes, style)
    bars.set_xlabel(f"indirect effect IE ({unit})")
    _words(words, nodes, descriptions, style)
    figure.legend(handles=_legend(style), loc="outside upper right", ncols=3)
    footnote(figure, NOTE, style)
    return figure


def _bars(axes: Axes, nodes: Table, style: Style) -> None:
    score, spread = nodes["score_test"], Z95 * nodes["se_test"]
    place = np.arange(len(score))
    palette = style.palette
    colours = [palette.positive if value >= 0 else palette.negative for value in score]
    hatches = ["////" if kind == "error" else "" for kind in nodes["kind"]]
    axes.barh(
        place,
        score,
        height=0.68,
        color=colours,
        hatch=hatches,
        edgecolor=palette.paper,
        linewidth=0,
        alpha=0.85,
    )
    axes.errorbar(score, place, xerr=spread, fmt="none", ecolor=palette.text, elinewidth=0.9, capsize=2)
    axes.plot(nodes["score_train"], place, "|", color=palette.text, markersize=9, markeredgewidth=1.4)
    axes.axvline(0, color=palette.muted, linewidth=0.8)
    names = [
        node_name(site, kind, feature)
        for site, kind, feature in zip(nodes["site"], nodes["kind"], nodes["feature"], strict=True)
    ]
    axes.set_yticks(place, names)
    axes.set_ylim(len(score) - 0.5, -0.5)
    axes.set_title(f"Top {len(score)} nodes over all sites")
    axes.tick_params(axis="y", length=0)
    grid(axes, "x")
    axes.tick_params(axis="y", length=0)


def _words(axes: Axes, nodes: Table, descriptions: Descriptions, style: Style) -> None:
    axes.set_axis_off()
    size = style.font_size * 0.85
    total = sum(width for _, width in COLUMNS)
    left = 0.0
    for title, width in COLUMNS:
        axes.annotate(
            title,
            (left / total, 1),
            xycoords="axes fraction",
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=size,
            fontweight="bold",
            color=style.palette.muted,
        )
        for row, words in enumerate(_column(title, nodes, descriptions)):
            text = as_many_as_fit(words, width - 0.12, size)
            axes.text(
                left / total, row, text, fontsize=size, va="center", transform=axes.get_yaxis_transform()
            )
        left += width


def _column(title: str, nodes: Table, descriptions: Descriptions) -> list[list[str]]:
    described = [
        descriptions.get((site, int(feature)))  # the error is number −1, which no description has
        for site, feature in zip(nodes["site"], nodes["feature"], strict=True)
    ]
    if title == PROMOTES:
        return [shown(promotes(item, 8)) for item in described]
    return [shown(fires_on(item, 8, "task" if title == IN_TASK else "text")) for item in described]


def _legend(style: Style) -> list[Patch]:
    palette = style.palette
    return [
        Patch(color=palette.positive, label="supports the clean answer"),
        Patch(color=palette.negative, label="opposes it"),
        Patch(
            facecolor=palette.muted, hatch="////", edgecolor=palette.paper, linewidth=0, label="error node"
        ),
    ]

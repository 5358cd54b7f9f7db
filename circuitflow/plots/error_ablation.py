"""Figure: error nodes ablated by layer, by strength and by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.error_cells import cells, colour_bar
from circuitflow.plots.error_series import (
    faithfulness_axis,
    figure_of_experiments,
    notes,
    places,
    say_nothing,
    scores_of,
    series,
    window_names,
)
from circuitflow.plots.numbers import counted
from circuitflow.plots.style import Style, footnote, new_figure
from circuitflow.plots.tables import Table, rows

NOTE = (
    " Predicted: 1 + Σ score / (m(M) − m(∅)), from the {scores} of the test pairs. Thresholds are shares of the "
    "largest |score| of any node. Positions count back from the token at which the answer is read (0); shorter prompts "
    "are left out where they have none."
)


def plot_error_ablation(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. F with the errors of single layers, of strong ones, and at single positions ablated.

    Input ``experiments`` (table of ablate_error_nodes); params ``style``, optionally ``method`` (of the scores);
    outputs ``png``, ``svg``.
    """
    figure_of_experiments(inputs, params, out, draw)


def draw(table: Table, facts: Mapping[str, Any], style: Style) -> Figure:
    """The figure, from the table of experiments."""
    by_layer, strong = rows(table, experiment="layer"), rows(table, experiment="threshold")
    single = rows(table, experiment="position")
    names = list(dict.fromkeys(window_names(single)))
    figure = new_figure(
        max(9.6, 3.4 + 0.4 * len(by_layer["F"])), 3.4 + (0.26 * len(names) + 1.0) * bool(names)
    )
    spec = figure.add_gridspec(
        2 if names else 1, 2, height_ratios=(3.0, 0.26 * len(names) + 0.4) if names else (1,)
    )
    axes = [figure.add_subplot(spec[0, column]) for column in range(2)]
    both = {name: np.concatenate([by_layer[name], strong[name]]) for name in table}
    _layers(axes[0], by_layer, rows(table, experiment="all"), style)
    _thresholds(axes[1], strong, style)
    for panel in axes:
        if panel.axison:
            faithfulness_axis(panel, both, style)
    if names:
        _positions(figure.add_subplot(spec[1, :]), single, names, style)
    footnote(figure, notes(both, facts) + NOTE.format(scores=scores_of(facts)), style)
    return figure


def _layers(axes: Axes, part: Table, together: Table, style: Style) -> None:
    names = [*window_names(part), *(["all"] if len(together["F"]) else [])]
    joined = {name: np.concatenate([part[name], together[name]]) for name in part}
    x = np.arange(len(names))
    palette = style.palette
    series(axes, x, joined, fmt="^", color=palette.error, label="measured")
    axes.plot(x, joined["predicted"], "_", color=palette.text, markersize=11, label="predicted by the scores")
    places(axes, names, "layer whose errors are ablated")
    axes.set_title("Errors of one layer, and of all", pad=16)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, borderaxespad=0.1)


def _thresholds(axes: Axes, part: Table, style: Style) -> None:
    if not len(part["F"]):
        say_nothing(axes, "no error node reaches a threshold", style)
        return
    order = np.argsort(part["threshold"])
    part = {name: column[order] for name, column in part.items()}
    names = [
        f"≥ {share:g}\n({counted(int(n), 'error')})"
        for share, n in zip(part["threshold"], part["nodes"], strict=True)
    ]
    series(axes, np.arange(len(names)), part, fmt="^-", color=style.palette.error, linewidth=1.1)
    places(axes, names, "share of the largest |score| that ablated errors reach", room=2 * len(names))
    axes.set_title("Errors by strength", pad=16)


def _positions(axes: Axes, single: Table, names: Sequence[str], style: Style) -> None:
    """F by layer and position; rows are layers, the deepest on top, and all together below."""
    found = dict(
        zip(zip(window_names(single), single["position"].tolist(), strict=True), single["F"], strict=True)
    )
    tokens = sorted({int(position) for position in single["position"]}, reverse=True)
    several = len(names) > 1
    order = [*reversed(names[:-1]), names[-1]] if several else list(names)
    grid = np.array([[found.get((name, token), np.nan) for token in tokens] for name in order])
    image = cells(axes, grid, style)
    prompts = {int(p): int(n) for p, n in zip(single["position"], single["n"], strict=True)}
    axes.set_xticks(range(len(tokens)), [f"{token}\n(n = {prompts[token]})" for token in tokens])
    axes.set_yticks(range(len(order)), [*order[:-1], "all"] if several else order)
    axes.set(title="Errors at one position", xlabel="tokens before the answer's", ylabel="layer")
    colour_bar(axes, image, "F")

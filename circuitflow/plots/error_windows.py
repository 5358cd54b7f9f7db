"""Figure: errors of windows of layers ablated: sliding windows, windows that grow, and what their scores say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.error_series import (
    experiments_of,
    faithfulness_axis,
    notes,
    places,
    scores_of,
    series,
    window_names,
)
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows, unit_of

TITLES = {
    "sliding": "Sliding, {width}",
    "expanding_right": "Growing from the first layer",
    "expanding_left": "Growing from the last layer",
    "range": "Chosen windows",
}
WIDTH = 12.0
"""Inches within which panels stand side by side."""
NOTE = (
    " Below: Σ of the ablated errors' {scores} on test pairs, by which m would rise if it were linear; the marks "
    "above are the F that follows from it. Windows count layers that have a site in this run."
)


def plot_error_windows(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. F of sliding and growing windows of ablated errors, and Σ score of each window.

    Input ``experiments`` (table of ablate_error_nodes); params ``style``, optionally ``metric`` and ``method`` (of
    the scores); outputs ``png``,
    ``svg``.
    """
    style = style_of(params)
    table, facts = experiments_of(inputs)
    facts = {**facts, "method": params.get("method")}
    with drawing(style):
        save(draw(table, facts, style, unit_of(params.get("metric"))), out, style)


def panels_of(table: Table) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Title and rows of every kind of window that the table has; a sliding width is a panel of its own."""
    found = []
    for name, title in TITLES.items():
        part = rows(table, experiment=name)
        for width in np.unique(part["layers"]) if name == "sliding" else [None]:
            here = part if width is None else rows(part, layers=width)
            if len(here["F"]):
                words = "1 layer" if width == 1 else f"{width} layers"
                found.append((title.format(width=words), here))
    return found


def draw(table: Table, facts: Mapping[str, Any], style: Style, unit: str = "logits") -> Figure:
    """The figure, from the table of experiments."""
    errors = rows(table, what="errors")
    found = panels_of(errors)
    shown = {name: np.concatenate([part[name] for _, part in found]) for name in errors}
    widest = max(len(part["F"]) for _, part in found)
    width = max(2.3, 0.34 * widest + 0.7)
    across = min(len(found), max(1, int(WIDTH // width)))
    lines = -(-len(found) // across)
    figure = new_figure(max(7.0, 0.9 + across * width), 0.8 + 3.9 * lines)
    heights = (2, 1) * lines
    panels = figure.subplots(2 * lines, across, height_ratios=heights, squeeze=False)
    least, most = _reach(shown["score_test"])
    for place in range(lines * across):
        above, below = panels[2 * (place // across) : 2 * (place // across) + 2, place % across]
        if place >= len(found):
            above.set_axis_off()
            below.set_axis_off()
            continue
        title, part = found[place]
        leftmost = place % across == 0
        _faithfulness(above, part, style)
        _scores(below, part, style)
        for axes in (above, below):
            places(axes, window_names(part), "layers ablated" if axes is below else "", room=int(5 * width))
        above.set_title(title)
        above.tick_params(labelbottom=False)
        faithfulness_axis(above, shown, style, "F" if leftmost else "")
        below.set(ylim=(least, most), ylabel=f"Σ IE ({unit})" if leftmost else "")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    footnote(figure, notes(shown, facts) + NOTE.format(scores=scores_of(facts)), style)
    return figure


def _faithfulness(axes: Axes, part: Table, style: Style) -> None:
    x = np.arange(len(part["F"]))
    series(axes, x, part, fmt="^-", color=style.palette.error, linewidth=1.0, label="errors ablated")
    look: dict[str, Any] = {"color": style.palette.text, "markersize": 10, "linestyle": ""}
    axes.plot(x, part["predicted"], "_", label="predicted by the scores", **look)


def _scores(axes: Axes, part: Table, style: Style) -> None:
    x = np.arange(len(part["F"]))
    axes.bar(x, part["score_test"], width=0.6, color=style.palette.error, alpha=0.75)
    axes.axhline(0, color=style.palette.muted, linewidth=0.8)
    grid(axes)


def _reach(scores: np.ndarray) -> tuple[float, float]:
    """An axis that holds 0 and all scores, with some room."""
    least, most = min(0.0, float(np.nanmin(scores))), max(0.0, float(np.nanmax(scores)))
    room = 0.08 * (most - least) or 1.0
    return least - room, most + room

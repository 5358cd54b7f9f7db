"""Figure: errors ablated against features ablated in their place, window by window."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.error_series import (
    faithfulness_axis,
    figure_of_experiments,
    notes,
    places,
    series,
    window_names,
)
from circuitflow.plots.error_windows import WIDTH, panels_of
from circuitflow.plots.numbers import counted
from circuitflow.plots.style import Style, footnote, new_figure, site_shades
from circuitflow.plots.tables import Table, rows

NAMED = {"errors": "errors", "nearest": "nearest in |score|", "committee": "committee"}
NOTE = (
    " In place of the errors the features of the same sites are ablated: the k of the largest |score| on train pairs "
    "(top-k), the one whose |score| is the nearest to the error's, or the fewest, from the largest down, whose "
    "|scores| add up to the error's (committee: {committee} per site)."
)


def plot_error_baselines(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. F with the errors of a window ablated, and with features of the same sites ablated.

    Input ``experiments`` (table of ablate_error_nodes); params ``style``; outputs ``png``, ``svg``.
    """
    figure_of_experiments(inputs, params, out, draw)


def draw(table: Table, facts: Mapping[str, Any], style: Style) -> Figure:
    """The figure, from the table of experiments."""
    found = panels_of(table)
    shown = {name: np.concatenate([part[name] for _, part in found]) for name in table}
    order = list(dict.fromkeys(map(str, shown["what"])))
    widest = max(len(set(window_names(part))) for _, part in found)
    width = max(2.4, min(0.62, 0.34 + 1.2 / widest) * widest + 0.7)
    across = min(len(found), max(1, int(WIDTH // width)))
    lines = -(-len(found) // across)
    figure = new_figure(max(8.0, 0.9 + across * width), 0.9 + 2.5 * lines)
    panels = figure.subplots(lines, across, sharey=True, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place >= len(found):
            axes.set_axis_off()
            continue
        title, part = found[place]
        _compared(axes, part, order, width, style)
        axes.set_title(title)
        faithfulness_axis(axes, shown, style, "F" if place % across == 0 else "")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(order))
    footnote(figure, notes(shown, facts) + NOTE.format(committee=_committee(table)), style)
    return figure


def _compared(axes: Axes, part: Table, order: Sequence[str], width: float, style: Style) -> None:
    names = list(dict.fromkeys(window_names(part)))
    looks = _looks(order, style)
    for number, what in enumerate(order):
        here = rows(part, what=what)
        x = np.array([names.index(name) for name in window_names(here)], float)
        shift = 0.6 * ((number + 0.5) / len(order) - 0.5)
        series(axes, x + shift, here, label=NAMED.get(what, what), linewidth=0, **looks[what])
    places(axes, names, "layers ablated", room=int(5 * width))


def _looks(order: Sequence[str], style: Style) -> dict[str, dict[str, Any]]:
    """Errors and the two matched baselines in colours of their own, top-k in shades of one."""
    palette = style.palette
    tops = [what for what in order if what.startswith("top-")]
    shades = site_shades(len(tops))
    return {
        "errors": {"fmt": "^", "color": palette.error, "markersize": 5},
        "nearest": {"fmt": "D", "color": palette.train},
        "committee": {"fmt": "s", "color": palette.complement},
        **{what: {"fmt": "o", "color": shade} for what, shade in zip(tops, shades, strict=True)},
    }


def _committee(table: Table) -> str:
    """How many features committees of single layers have: "1–4 features"."""
    part = rows(rows(table, what="committee"), layers=1)
    sizes = sorted({int(n) for n in part["nodes"]})
    if not sizes:
        return "several"
    return counted(sizes[0], "feature") if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]} features"

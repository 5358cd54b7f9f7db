"""Figure: F by the layer up to which errors are ablated and the range in which features are restored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.error_cells import WRITTEN, cells, colour_bar
from circuitflow.plots.error_series import figure_of_experiments, notes, window_names
from circuitflow.plots.numbers import interval
from circuitflow.plots.style import Style, footnote, new_figure
from circuitflow.plots.tables import Table, rows

NOTE = " Colour: F; white is the whole model's 1."


def plot_error_heatmap(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Cells of F: rows by bound of the ablated errors, columns by range of the restored features.

    Input ``experiments`` (table of ablate_error_nodes); params ``style``; outputs ``png``, ``svg``.
    """
    figure_of_experiments(inputs, params, out, draw)


def draw(table: Table, facts: Mapping[str, Any], style: Style) -> Figure:
    """The figure, from the table of experiments."""
    part = rows(table, experiment="heatmap")
    across = list(dict.fromkeys(window_names(part, "restored_")))
    down = list(dict.fromkeys(window_names(part)))
    place = {
        key: row
        for row, key in enumerate(zip(window_names(part), window_names(part, "restored_"), strict=True))
    }
    values = np.full((len(down), len(across)), np.nan)
    below = [["" for _ in across] for _ in down]
    for (bound, window), row in place.items():
        at = down.index(bound), across.index(window)
        values[at] = part["F"][row]
        below[at[0]][at[1]] = interval(float(part["low"][row]), float(part["high"][row]))
    written = len(across) <= WRITTEN[0]
    width, height = (0.9, 0.44) if written else (0.46, 0.26)
    figure = new_figure(max(6.4, 2.2 + width * len(across)), max(3.0, 1.9 + height * len(down)))
    axes = figure.subplots()
    image = cells(axes, values, style, below)
    axes.set_xticks(range(len(across)), across, rotation=0 if written else 60)
    axes.set_yticks(range(len(down)), down)
    k = int(part["k"].max(initial=0))
    axes.set(
        xlabel=f"layers whose top {k} features per site are restored",
        ylabel="layers whose errors are ablated",
    )
    colour_bar(axes, image, "F")
    footnote(figure, notes(part, facts, "Brackets") + NOTE, style)
    return figure

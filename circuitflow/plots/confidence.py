"""Figure: how many prompts the model is how confident about."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_table

TOGETHER = "all cases"
PANELS = {
    "difference": ("logit(right) − logit(wrong) at least", "min_difference", False),
    "probability": ("probability of the right answer at least", "min_probability", True),
    "rank": ("rank of the right answer at most", "max_rank", True),
}
COLOURS = ("#c1521f", "#2166ac", "#a07400", "#7a7f87", "#1c2024", "#b2182b")
NOTE = (
    "Clean prompts before any filter; {counts}. Thick: all cases, with 95 % Wilson intervals; thin: test prompts of "
    "each case. Dotted line: the threshold that task.confidence sets."
)


def plot_confidence(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Share of prompts that pass thresholds of logit difference, probability and rank.

    Input ``confidence`` (table of count_confident); params ``style``, ``chosen`` (the section task.confidence); outputs
    ``png``, ``svg``.
    """
    style = style_of(params)
    table = read_table(inputs["confidence"])
    with drawing(style):
        save(draw(table, params["chosen"], style), out, style)


def draw(table: Table, chosen: Mapping[str, Any], style: Style) -> Figure:
    """The figure, from the table of counts and the thresholds in use."""
    figure = new_figure(10.2, 3.9)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (quantity, (label, key, log)) in zip(panels, PANELS.items(), strict=True):
        _panel(axes, rows(table, quantity=quantity), style)
        if log:
            log_axis(axes, "x", table["threshold"][table["quantity"] == quantity])
        if chosen.get(key) is not None and (not log or chosen[key] > 0):
            axes.axvline(chosen[key], color=style.palette.text, linestyle=":", linewidth=1.2)
        axes.set_xlabel(label)
        axes.set_ylim(0, 1.02)
    panels[0].set_ylabel("share of prompts")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 6), columnspacing=1.2)
    everything = rows(table, case=TOGETHER)
    counts = ", ".join(
        f"n = {int(everything['n'][everything['split'] == split][0])} {split}"
        for split in ("train", "test")
        if (everything["split"] == split).any()
    )
    footnote(figure, NOTE.format(counts=counts), style)
    return figure


def _panel(axes: Axes, table: Table, style: Style) -> None:
    cases = [case for case in dict.fromkeys(table["case"]) if case != TOGETHER]
    for number, case in enumerate(cases if len(cases) > 1 else ()):
        part = rows(table, case=case, split="test")
        label = f"{str(case).replace('_', ' ')} (n = {int(part['n'][0])})" if len(part["n"]) else str(case)
        axes.plot(
            part["threshold"], part["share"], "-", lw=0.9, color=COLOURS[number % len(COLOURS)], label=label
        )
    for split in ("train", "test"):
        part = rows(table, case=TOGETHER, split=split)
        if not len(part["share"]):
            continue
        colour = getattr(style.palette, split)
        spread = np.maximum([part["share"] - part["low"], part["high"] - part["share"]], 0)
        axes.errorbar(
            part["threshold"],
            part["share"],
            yerr=spread,
            fmt="o-",
            color=colour,
            markersize=3.6,
            label=f"all, {split}",
        )
    grid(axes)

"""Figure: how well the model does the task, per structure, before anything is explained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.data.proportions import wilson
from circuitflow.jobs import Output
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_table

NOTE = (
    "Clean and patched prompts before the confidence filter. Left: share whose right answer has the "
    "larger logit, with 95 % Wilson intervals. Right: bars show the middle half and 90 % of the prompts, "
    "the dot the median."
)


NOTE_WITHOUT_WRONG = (
    "Contexts before the confidence filter; there are no wrong answers. Left: share whose right answer is the "
    "model's first choice, with 95 % Wilson intervals. Right: the right answer's logit less that of the likeliest "
    "other token; bars show the middle half and 90 % of the contexts, the dot the median."
)


def plot_task_accuracy(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Accuracy and logit differences per structure.

    Input ``prompts`` (table of filter_pairs); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(draw(read_table(inputs["prompts"]), style), out, style)


def draw(prompts: Table, style: Style) -> Figure:
    """The figure, from the table of prompts."""
    cases = list(dict.fromkeys(prompts["case"]))
    figure = new_figure(7.2, 1.5 + 0.46 * len(cases))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.15))
    _accuracy(left, prompts, cases, style)
    _differences(right, prompts, cases, style)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    left.set_yticks(range(len(cases)), [case.replace("_", " ") for case in cases])
    left.set_ylim(len(cases) - 0.5, -0.5)
    note = NOTE if _opposed(prompts) else NOTE_WITHOUT_WRONG
    if prompts["kept"].all():  # of a cluster, or where no threshold is set
        note = note.replace(" before the confidence filter", "")
    footnote(figure, note, style)
    return figure


def _offsets(splits: Sequence[str]) -> dict[str, float]:
    return dict(zip(splits, np.linspace(-0.16, 0.16, len(splits)) if len(splits) > 1 else [0.0], strict=True))


def _opposed(prompts: Table) -> bool:
    """Whether prompts have wrong answers."""
    return bool(np.any(prompts["wrong_answer"] != ""))


def _accuracy(axes: Axes, table: Table, cases: Sequence[str], style: Style) -> None:
    splits = sorted(set(table["split"]), reverse=True)
    for split, offset in _offsets(splits).items():
        colour = getattr(style.palette, split)
        chosen = [rows(table, split=split, case=case) for case in cases]
        right = np.array([np.sum(part["difference"] > 0) for part in chosen])
        n = np.array([len(part["difference"]) for part in chosen])
        share = right / np.maximum(n, 1)
        bounds = np.array([wilson(r, k) for r, k in zip(right, n, strict=True)])
        spread = np.abs(bounds.T - share)
        axes.errorbar(
            share,
            np.arange(len(cases)) + offset,
            xerr=spread,
            fmt="o",
            markersize=4.5,
            color=colour,
            capsize=2,
            label=f"{split} ({n.sum()} prompts)",
        )
    if _opposed(table):
        axes.axvline(0.5, color=style.palette.muted, linewidth=0.8, linestyle=":")
        axes.text(0.5, -0.46, " chance", fontsize=style.font_size * 0.75, color=style.palette.muted, va="top")
    axes.set(xlabel="accuracy", title="Accuracy", xlim=(min(0.45, axes.get_xlim()[0]), 1.02))
    grid(axes, "x")


def _differences(axes: Axes, table: Table, cases: Sequence[str], style: Style) -> None:
    splits = sorted(set(table["split"]), reverse=True)
    for split, offset in _offsets(splits).items():
        colour = getattr(style.palette, split)
        for row, case in enumerate(cases):
            values = rows(table, split=split, case=case)["difference"]
            if not len(values):
                continue
            p5, p25, p50, p75, p95 = np.percentile(values, (5, 25, 50, 75, 95))
            y = row + offset
            axes.plot([p5, p95], [y, y], color=colour, linewidth=1.2, solid_capstyle="butt")
            axes.plot([p25, p75], [y, y], color=colour, linewidth=5, solid_capstyle="butt", alpha=0.55)
            axes.plot(
                [p50], [y], "o", color=colour, markersize=4.5, markeredgecolor="white", markeredgewidth=0.7
            )
    axes.axvline(0, color=style.palette.muted, linewidth=0.8, linestyle=":")
    wrong = "wrong answer" if _opposed(table) else "likeliest other"
    axes.set(xlabel=f"logit(right answer) − logit({wrong})", title="Logit difference")
    grid(axes, "x")

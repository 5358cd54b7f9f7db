"""Figure: how faithfulness is spread over prompts, and which prompts are far off."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.plots.conditions import main_rows
from circuitflow.plots.numbers import fixed
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import ASSEMBLED, Table, rows, unit_of
from circuitflow.store.tables import read_table

RANGE = (-1.0, 3.0)
"""Of F in the histogram; ratios beyond are counted, not drawn."""
BINS = 24
COLOURS = ("#0f6e84", "#c1521f", "#6c4fa3", "#7a7f87", "#a07400", "#1c2024")
MARKERS = "osDv^P"


def plot_outliers(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Histograms of F, m(C), m(∅) and m(M) over prompts for the assembled circuit, and F against m(M).

    Input ``prompts`` (table of evaluate_circuit); params ``style``, optionally ``metric``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    table = read_table(inputs["prompts"])
    with drawing(style):
        save(draw(table, style, unit_of(params.get("metric")), said_of(params.get("metric"))), out, style)


MEANS = {
    "logit_difference": "negative: the model is right",
    "kl": "0: as the whole model; the lower, the nearer to it",
}
"""What values of the metric say."""


def said_of(metric: Mapping[str, Any] | None) -> str:
    """What values of a metric say; a logit difference if nothing is said."""
    kind = str((metric or {}).get("kind", "logit_difference"))
    return MEANS.get(kind, "the lower, the more the model is right")


def draw(table: Table, style: Style, unit: str = "logits", means: str = MEANS["logit_difference"]) -> Figure:
    """The figure, from the table of prompts.

    :param means: what values of the metric say.
    """
    part = rows(main_rows(table), series="circuit", source=ASSEMBLED)
    figure = new_figure(9.8, 6.6)
    axes = figure.subplots(2, 2)
    beyond = _of_ratios(axes[0, 0], part, style)
    _of_m(axes[0, 1], part, style, f"{unit}; {means}")
    _against(axes[1, 0], part, "m_full", style)
    axes[1, 0].set(xlabel=f"m(M), whole model ({unit})", title="F against m(M)")
    part = {**part, "reach": part["m_full"] - part["m_empty"]}
    _against(axes[1, 1], part, "reach", style)
    axes[1, 1].set(xlabel=f"m(M) − m(∅), what F divides by ({unit})", title="F against its denominator")
    axes[1, 1].axvline(0, color=style.palette.muted, linewidth=0.9, linestyle=":")
    axes[1, 0].legend(loc="best", fontsize=style.font_size * 0.78, handletextpad=0.2)
    footnote(figure, _note(part, beyond), style)
    return figure


def _of_ratios(axes: Axes, part: Table, style: Style) -> int:
    """Histogram of F; how many prompts lie beyond it."""
    ratios = part["F"][np.isfinite(part["F"])]
    inside = ratios[(ratios >= RANGE[0]) & (ratios <= RANGE[1])]
    low, high = (min(inside.min(), 0), max(inside.max(), 1)) if len(inside) else (0.0, 1.0)
    axes.hist(inside, bins=np.linspace(low, high, BINS + 1).tolist(), color=style.palette.circuit, alpha=0.85)
    ratio = (part["m_circuit"] - part["m_empty"]).mean() / (part["m_full"] - part["m_empty"]).mean()
    lines = (
        ("ratio of means", ratio, "-"),
        ("mean of ratios", ratios.mean(), "--"),
        ("median", np.median(ratios), ":"),
    )
    for label, value, dashes in lines:
        place = float(np.clip(value, low, high))
        look: dict[str, Any] = {"color": style.palette.text, "linestyle": dashes, "linewidth": 1.3}
        axes.axvline(place, ymax=0.86, label=f"{label} {fixed(value)}", **look)
    axes.set(xlabel="F of single prompts", ylabel="prompts", title="F of the assembled circuit")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.25)
    axes.legend(
        loc="upper left", ncols=3, columnspacing=1.0, handlelength=1.6, fontsize=style.font_size * 0.78
    )
    grid(axes)
    return len(part["F"]) - len(inside)


def _of_m(axes: Axes, part: Table, style: Style, unit: str) -> None:
    palette = style.palette
    shown = (
        ("m_empty", "m(∅), all nodes ablated", palette.random),
        ("m_circuit", "m(C), the circuit", palette.circuit),
        ("m_full", "m(M), whole model", palette.complement),
    )
    every = np.concatenate([part[name] for name, _, _ in shown])
    edges = np.linspace(every.min(), every.max(), BINS + 1).tolist()
    for name, label, colour in shown:
        axes.hist(part[name], bins=edges, histtype="stepfilled", color=colour, alpha=0.28)
        axes.hist(part[name], bins=edges, histtype="step", color=colour, linewidth=1.4, label=label)
    axes.axvline(0, color=palette.muted, linewidth=0.9, linestyle=":")
    axes.set(xlabel=f"m ({unit})", ylabel="prompts", title="The metric")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.35)
    axes.legend(loc="upper left", fontsize=style.font_size * 0.78)
    grid(axes)


def _against(axes: Axes, part: Table, x: str, style: Style) -> None:
    """F of every prompt by case; outliers ringed."""
    for number, case in enumerate(dict.fromkeys(part["case"])):
        here = part["case"] == case
        look: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
        }
        label = f"{str(case).replace('_', ' ')} (n = {int(here.sum())})"
        axes.scatter(part[x][here], part["F"][here], s=22, alpha=0.8, linewidths=0, label=label, **look)
    far = part["outlier"].astype(bool) & np.isfinite(part["F"])
    ring: dict[str, Any] = {
        "s": 90,
        "facecolors": "none",
        "edgecolors": style.palette.negative,
        "linewidths": 1.2,
    }
    axes.scatter(part[x][far], part["F"][far], label=f"outliers ({int(far.sum())})", **ring)
    for level in (0, 1):
        axes.axhline(level, color=style.palette.muted, linewidth=0.9, linestyle=":", zorder=0)
    axes.set_ylabel("F")
    grid(axes, "both")


def _note(part: Table, beyond: int) -> str:
    cut = f" {beyond} of them lie beyond the histogram of F." if beyond else ""
    return (
        f"n = {len(part['F'])} test prompts, the assembled circuit, main ablation.{cut} Outliers: F more than 1.5 "
        "interquartile ranges outside the quartiles. A prompt whose m(M) is near its m(∅) has a ratio near 0 / 0, "
        "which sways the mean of ratios but hardly the ratio of means."
    )

"""Figure: next-token probabilities of single prompts without a circuit, and how answers respond to its features."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from circuitflow.jobs import Output
from circuitflow.plots.numbers import number
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import (
    Style,
    drawable,
    drawing,
    footnote,
    grid,
    new_figure,
    save,
    shown,
    style_of,
    wrapped,
)
from circuitflow.plots.tables import Table, rows, unit_of
from circuitflow.store.tables import read_provenance, read_table

CLEAN = "whole model"
PROMPTS, TOKENS, CURVES = 4, 8, 4
ROLES = {"right": "positive", "wrong": "negative", "other": "muted"}
CASES = ("#0f6e84", "#c1521f", "#6c4fa3", "#7a7f87", "#a07400", "#1c2024")
LOOKS: tuple[dict[str, Any], ...] = (
    {"marker": "o", "color": "#1c2024"},
    {"marker": "v", "color": "#c1521f"},
    {"marker": "^", "color": "#0f6e84"},
    {"marker": "s", "color": "#6c4fa3"},
    {"marker": "D", "color": "#a07400"},
    {"marker": "P", "color": "#7a7f87"},
)
NOTE = (
    "Above: next-token probabilities of single prompts under interventions (ablation: {ablation}), {prompts} of n = "
    "{n} "
    "prompts; blue: right answers, red: wrong ones, then the likeliest tokens; titles give m under each. Below: m with "
    "one feature held at multiples of its usual value at the tokens where it is active; lines: mean over the prompts "
    "of "
    "a case, bars: 95 % intervals (Student's t) over them; n: {cases}. 1 is about the clean run, 0 the feature off."
)


def plot_effects(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Next-token probabilities by prompt and intervention, and response curves.

    Inputs ``effects``, ``response`` (tables of measure_effects); params ``style``, optionally ``metric``; outputs
    ``png``, ``svg``.
    """
    style = style_of(params)
    effects, response = (read_table(inputs[name]) for name in ("effects", "response"))
    conventions = read_provenance(inputs["effects"]).get("conventions", {})
    with drawing(style):
        save(draw(effects, response, conventions, style, unit_of(params.get("metric"))), out, style)


def draw(
    effects: Table, response: Table, conventions: Mapping[str, Any], style: Style, unit: str = "logits"
) -> Figure:
    """The figure, from both tables."""
    prompts = spread_over_cases(effects, PROMPTS)
    curves = list(dict.fromkeys(map(str, response["node"])))[:CURVES]
    done = list(dict.fromkeys(map(str, effects["intervention"])))
    looks = {name: LOOKS[i % len(LOOKS)] for i, name in enumerate(done)}
    figure = new_figure(10.5, 3.9 + (3.4 if curves else 0))
    spec = figure.add_gridspec(2 if curves else 1, 1)
    cells = spec[0].subgridspec(1, max(len(prompts), 1))
    for column, pair in enumerate(prompts):
        _probabilities(figure.add_subplot(cells[column]), rows(effects, pair=pair), looks, style)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(done), columnspacing=1.4)
    if curves:
        cells = spec[1].subgridspec(1, len(curves))
        first = None
        for place, node in enumerate(curves):
            axes = figure.add_subplot(cells[place], sharey=first)
            _response(axes, rows(response, node=node), node, style)
            first = first or axes
            axes.tick_params(labelleft=not place)
        assert first is not None
        first.set_ylabel(f"m ({unit})")
        first.legend(loc="best", handletextpad=0.3)
        _frame(first, response)
    sizes = {str(case): int(n) for case, n in zip(response["case"], response["n"], strict=True)}
    note = NOTE.format(
        ablation=conventions.get("ablated", "as configured"),
        prompts=len(prompts),
        n=int(effects["n"].max()),
        cases=", ".join(f"{case} {n}" for case, n in sizes.items()) or "none",
    )
    footnote(figure, note, style)
    return figure


def _frame(axes: Axes, response: Table) -> None:
    """Keep wide intervals of few prompts from squeezing the curves."""
    low, high = float(response["m"].min()), float(response["m"].max())
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


def spread_over_cases(effects: Table, most: int) -> list[int]:
    """At most so many pairs, the first of every case before the second of any."""
    seen: dict[str, list[int]] = {}
    for pair, case in zip(effects["pair"].tolist(), effects["case"], strict=True):
        if pair not in seen.setdefault(str(case), []):
            seen[str(case)].append(pair)
    order = [(turn, case, pair) for case, pairs in seen.items() for turn, pair in enumerate(pairs)]
    return [pair for _, _, pair in sorted(order, key=lambda one: (one[0], list(seen).index(one[1])))[:most]]


def _probabilities(axes: Axes, prompt: Table, looks: Mapping[str, Any], style: Style) -> None:
    """Probabilities of one prompt's answers and likeliest tokens, a mark per intervention."""
    clean = rows(prompt, intervention=CLEAN)
    most = np.array([prompt["probability"][prompt["token"] == token].max() for token in clean["token"]])
    answers = clean["role"] != "other"
    order = np.argsort(-(most + 2.0 * answers), kind="stable")[:TOKENS]
    order = order[np.lexsort((-clean["probability"][order], ~answers[order]))]
    heights = {int(token): height for height, token in enumerate(clean["token"][order][::-1])}
    for height in heights.values():
        axes.axhline(height, color=style.palette.grid, linewidth=0.6, zorder=0)
    drawn: list[float] = []
    for name, look in looks.items():
        part = rows(prompt, intervention=name)
        here = np.isin(part["token"], list(heights))
        at = [heights[int(token)] for token in part["token"][here]]
        axes.plot(part["probability"][here], at, linestyle="", markersize=5.5, alpha=0.85, label=name, **look)
        drawn += part["probability"][here].tolist()
    log_axis(axes, "x", drawn)
    names = shown(map(str, clean["text"][order][::-1]))
    axes.set_yticks(range(len(names)), names)
    for label, role in zip(axes.get_yticklabels(), clean["role"][order][::-1], strict=True):
        label.set_color(getattr(style.palette, ROLES[str(role)]))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("probability")
    size = style.font_size * 0.85
    lines = wrapped(drawable(str(prompt["prompt"][0]).strip()), 2.2, size)
    said = [number(float(rows(prompt, intervention=name)["m"][0]), 3) for name in looks]
    axes.set_title("\n".join([*lines[:2], f"m {', '.join(said)}"]), fontsize=size)
    grid(axes, "x")


def _response(axes: Axes, part: Table, node: str, style: Style) -> None:
    axes.axvline(1, color=style.palette.muted, linewidth=0.9, linestyle=":")
    cases: Sequence[str] = list(dict.fromkeys(map(str, part["case"])))
    for order, case in enumerate(cases):
        here = rows(part, case=case)
        multiples = np.unique(here["multiple"])
        drawn = [here["m"][here["multiple"] == multiple] for multiple in multiples]
        mean = np.array([values.mean() for values in drawn])
        error = np.array(
            [
                stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
                if len(values) > 1
                else 0
                for values in drawn
            ]
        )
        colour = CASES[order % len(CASES)]
        axes.errorbar(
            multiples,
            mean,
            yerr=error,
            fmt="o-",
            color=colour,
            markersize=3.2,
            elinewidth=0.9,
            linewidth=1.2,
            label=case,
        )
    usual = sorted(set(np.round(part["reference"], 3).tolist()))
    span = number(usual[0]) if len(usual) == 1 else f"{number(usual[0])} to {number(usual[-1])}"
    axes.set_title(f"{node}\nusual value {span}", fontsize=style.font_size * 0.9)
    axes.set_xlabel("multiple of its usual value")
    grid(axes)

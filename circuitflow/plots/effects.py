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
MARKERS = ("o", "v", "^", "s", "D", "P")
COLOURS = ("#1c2024", "#c1521f", "#0f6e84", "#6c4fa3", "#a07400", "#7a7f87")
NOTE = (
    "Above: next-token probabilities of single prompts under interventions (ablation: {ablation}), {prompts} of n = "
    "{n} prompts; blue: right answers, red: wrong ones, then the likeliest tokens; titles give m under each, in the "
    "order of the legend."
)
CURVE_NOTE = (
    " Below: m with one feature held, at each token where it fires in a prompt, at multiples of its own clean value "
    "there, so that 1 is the clean run and 0 the feature off (plain values: in units of its mean); lines: mean "
    "over the prompts of a case in which it fires (n in the titles, of all prompts of the case), dashed: their m in "
    "the clean run, bars: 95 % intervals (Student's t) over them."
)
BEYOND = " Arrowheads: intervals that go on beyond the frame."
TITLE = 1.65
"""Width of titles in inches: they take part in the layout, which has four panels side by side."""
SPAN = 2.0
"""Room that intervals get above and below the curves, in spans of the curves, before they leave the frame."""


def plot_effects(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Next-token probabilities by prompt and intervention, and response curves.

    Inputs ``effects``, ``response`` (tables of measure_effects); params ``style``, optionally ``metric``; outputs
    ``png``, ``svg``.
    """
    style = style_of(params)
    effects, response = (read_table(inputs[name]) for name in ("effects", "response"))
    conventions = read_provenance(inputs["effects"]).get("conventions", {})
    silent = read_provenance(inputs["response"]).get("silent", {})
    with drawing(style):
        unit = unit_of(params.get("metric"))
        save(draw(effects, response, conventions, style, unit, silent), out, style)


def draw(
    effects: Table,
    response: Table,
    conventions: Mapping[str, Any],
    style: Style,
    unit: str = "logits",
    silent: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """The figure, from both tables.

    :param silent: cases in which a feature with a curve never fires, by its id.
    """
    prompts = spread_over_cases(effects, PROMPTS)
    curves = list(dict.fromkeys(map(str, response["node"])))[:CURVES]
    done = list(dict.fromkeys(map(str, effects["intervention"])))
    looks = {name: look(number) for number, name in enumerate(done)}
    figure = new_figure(10.5, 4.0 + 0.15 * max(len(done) - 3, 0) + (3.8 if curves else 0))
    spec = figure.add_gridspec(2 if curves else 1, 1)
    cells = spec[0].subgridspec(1, max(len(prompts), 1))
    for column, pair in enumerate(prompts):
        _probabilities(figure.add_subplot(cells[column]), rows(effects, pair=pair), looks, style)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(done), 4), columnspacing=1.4)
    cut = bool(curves) and _curves(figure, spec[1], response, curves, style, unit)
    note = NOTE.format(
        ablation=conventions.get("ablated", "as configured"), prompts=len(prompts), n=int(effects["n"].max())
    )
    if curves:
        note += CURVE_NOTE + (BEYOND if cut else "")
    for name, cases in (silent or {}).items():
        note += f" {name} fires in no prompt of {', '.join(cases)}."
    footnote(figure, note, style)
    return figure


def look(number: int) -> dict[str, Any]:
    """Marker and colour of an intervention; each has one of its own, hollow after the first round."""
    turn, place = divmod(number, len(MARKERS))
    colour = COLOURS[(place + turn) % len(COLOURS)]
    return {"marker": MARKERS[place], "color": colour, "markerfacecolor": "none" if turn % 2 else colour}


def _curves(
    figure: Figure, spec: Any, response: Table, curves: Sequence[str], style: Style, unit: str
) -> bool:
    """One panel per feature, all on one axis of m; True if intervals leave the frame."""
    cells = spec.subgridspec(1, len(curves))
    panels: list[Axes] = []
    bars = []
    for place, node in enumerate(curves):
        axes = figure.add_subplot(cells[place], sharey=panels[0] if panels else None)
        bars.append(_response(axes, rows(response, node=node), node, style))
        axes.tick_params(labelleft=not place)
        panels.append(axes)
    panels[0].set_ylabel(f"m ({unit})")
    _cases(panels, figure)
    low = min(float(mean.min()) for panel in bars for _, mean, _, _ in panel)
    high = max(float(mean.max()) for panel in bars for _, mean, _, _ in panel)
    room = SPAN * (high - low) or 1.0
    bottom = max(
        low - room, min(float((mean - error).min()) for panel in bars for _, mean, error, _ in panel)
    )
    top = min(high + room, max(float((mean + error).max()) for panel in bars for _, mean, error, _ in panel))
    margin = 0.06 * (top - bottom) or 1.0
    panels[0].set_ylim(bottom - margin, top + margin)
    cut = [_arrowheads(axes, panel) for axes, panel in zip(panels, bars, strict=True)]
    return any(cut)


def _cases(panels: Sequence[Axes], figure: Figure) -> None:
    """One legend of every case that any panel has."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in found}
    panels[0].legend(list(found.values()), list(found), loc="best", handletextpad=0.3)


Bars = list[tuple[np.ndarray, np.ndarray, np.ndarray, str]]
"""Multiples, means, half widths of their intervals, and the colour, of every case."""


def _arrowheads(axes: Axes, bars: Bars) -> bool:
    """Mark intervals at the edge where they leave the frame."""
    bottom, top = axes.get_ylim()
    cut = False
    for multiples, mean, error, colour in bars:
        for beyond, edge, marker in ((mean + error > top, top, "^"), (mean - error < bottom, bottom, "v")):
            cut = cut or bool(beyond.any())
            at = multiples[beyond]
            if not len(
                at
            ):  # an empty line that is not clipped would lie at the figure's corner in the layout
                continue
            axes.plot(at, np.full(len(at), edge), marker, color=colour, markersize=4.5, clip_on=False)
    return cut


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
    for name, how in looks.items():
        part = rows(prompt, intervention=name)
        here = np.isin(part["token"], list(heights))
        at = [heights[int(token)] for token in part["token"][here]]
        axes.plot(part["probability"][here], at, linestyle="", markersize=5.5, alpha=0.85, label=name, **how)
        drawn += part["probability"][here].tolist()
    log_axis(axes, "x", drawn)
    names = shown(map(str, clean["text"][order][::-1]))
    axes.set_yticks(range(len(names)), names)
    for label, role in zip(axes.get_yticklabels(), clean["role"][order][::-1], strict=True):
        label.set_color(getattr(style.palette, ROLES[str(role)]))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("probability")
    size = style.font_size * 0.8
    lines = wrapped(drawable(str(prompt["prompt"][0]).strip()), TITLE, size)
    said = [number(float(rows(prompt, intervention=name)["m"][0]), 3) for name in looks]
    values = wrapped(f"m {', '.join(said)}", TITLE, size)
    axes.set_title("\n".join([*lines[:2], *values]), fontsize=size, fontweight="normal")
    grid(axes, "x")


def _response(axes: Axes, part: Table, node: str, style: Style) -> Bars:
    axes.axvline(1, color=style.palette.muted, linewidth=0.9, linestyle=":")
    drawn: Bars = []
    said = []
    for case in dict.fromkeys(map(str, part["case"])):
        here = rows(part, case=case)
        colour = CASES[len(drawn) % len(CASES)]
        multiples = np.unique(here["multiple"])
        values = [here["m"][here["multiple"] == multiple] for multiple in multiples]
        mean = np.array([of.mean() for of in values])
        error = np.array([half_width(of) for of in values])
        how: dict[str, Any] = {"markersize": 3.2, "elinewidth": 0.9, "linewidth": 1.2, "label": case}
        axes.errorbar(multiples, mean, yerr=error, fmt="o-", color=colour, **how)
        _, first = np.unique(here["pair"], return_index=True)
        axes.axhline(float(here["clean"][first].mean()), color=colour, linewidth=0.8, linestyle="--")
        said.append(f"{int(here['n'][0])} of {int(here['prompts'][0])} {case}")
        drawn.append((multiples, mean, error, colour))
    usual = sorted({number(float(value)) for value in np.unique(part["usual"])}, key=len)
    span = number(float(part["usual"].min()))
    if len(usual) > 1:
        span += f" to {number(float(part['usual'].max()))}"
    size = style.font_size * 0.8
    lines = wrapped(f"n = {', '.join(said)}; usual value {span}", 1.4 * TITLE, size)
    axes.set_title("\n".join([node, *lines]), fontsize=size, fontweight="normal")
    axes.set_xlabel("multiple of its own value")
    grid(axes)
    return drawn


def half_width(values: np.ndarray) -> float:
    """Of the 95 % interval of a mean (Student's t); 0 of a single value."""
    if len(values) < 2:
        return 0.0
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)

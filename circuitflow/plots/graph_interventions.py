"""Figure: what holding features of a prompt at other values does, and how well its graph predicted that."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from circuitflow.jobs import Output
from circuitflow.plots.numbers import MINUS, fixed, interval, number
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import (
    SMALL,
    TINY,
    Style,
    drawable,
    drawing,
    fitting,
    footnote,
    grid,
    new_figure,
    save,
    shown,
    style_of,
    text_width,
)
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_provenance, read_table

INTERVENTIONS, TOKENS, MODES = 4, 8, 4
WIDTH = 10.5
KINDS = {
    "by hand": ("s", "complement"),
    "supernode": ("D", "train"),
    "feature": ("o", "feature"),
}
TARGETS = {
    "logit": ("Logits", "change of logit − mean (logits)"),
    "feature": ("Features", "change of pre-activation / activation"),
}
NOTE = (
    "Prompt: {prompt} Above: next-token probabilities before and after {count} of {all} interventions "
    "({responds}). "
    "Below: effect in the model against effect predicted by the graph; a mark is one target of one intervention "
    "({n} interventions); dashed: equal; r and slope with 95 % intervals over interventions (bootstrap), single: "
    "of single features. "
    "{modes}{cut}"
)


def plot_graph_interventions(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Probabilities before and after interventions, and measured against predicted effects.

    Inputs ``interventions``, ``effects``, ``agreement`` (tables of intervene_on_graph); params ``style``; outputs
    ``png``, ``svg``.
    """
    style = style_of(params)
    tables = [read_table(inputs[name]) for name in ("interventions", "effects", "agreement")]
    prompt = str(read_provenance(inputs["effects"]).get("prompt", ""))
    with drawing(style):
        save(draw(tables[0], tables[1], tables[2], prompt, style), out, style)


def draw(interventions: Table, effects: Table, agreement: Table, prompt: str, style: Style) -> Figure:
    """The figure, from the three tables."""
    modes = list(dict.fromkeys(map(str, agreement["mode"])))[:MODES]
    panels = chosen(interventions, INTERVENTIONS)
    figure = new_figure(WIDTH, (3.2 if panels else 0.6) + 5.4)
    spec = figure.add_gridspec(3, 1, height_ratios=(1.15 if panels else 0.05, 1, 1))
    above = spec[0].subgridspec(1, max(len(panels), 1))
    mode = str(interventions["mode"][-1]) if panels else ""
    for place, (kind, name) in enumerate(panels):
        part = rows(interventions, kind=kind, intervention=name, mode=mode)
        _probabilities(figure.add_subplot(above[place]), part, name, style, WIDTH / len(panels) - 0.9)
    if panels:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
    left_out = 0
    for line, target in enumerate(TARGETS):
        cells = spec[1 + line].subgridspec(1, max(len(modes), 1))
        for place, each in enumerate(modes):
            axes = figure.add_subplot(cells[place])
            fit = rows(agreement, mode=each, target=target)
            left_out += _agreement(axes, rows(effects, mode=each, target=target), fit, style)
            axes.set_title(f"{TARGETS[target][0]}, {each}\n{_said(fit)}", fontsize=style.font_size * TINY)
            axes.set_xlabel("predicted" if line else "")
            if not place:
                axes.set_ylabel(f"measured\n{TARGETS[target][1]}", fontsize=style.font_size * SMALL)
                if not line and axes.get_legend_handles_labels()[1]:
                    axes.legend(loc="upper left", handletextpad=0.1, borderaxespad=0.2)
    every = all_of(interventions)
    note = NOTE.format(
        prompt=f"“{drawable(prompt.strip())}”.",
        count=len(panels),
        all=len(every),
        responds=f"mode {mode}",
        n=len(every),
        modes=explained(interventions, modes),
        cut=f" {left_out} effects are not seen: without a prediction, or beyond the frame."
        if left_out
        else "",
    )
    footnote(figure, note, style)
    return figure


def chosen(interventions: Table, most: int) -> list[tuple[str, str]]:
    """Interventions that are shown one by one: those by hand first, then supernodes, then features."""
    order = list(KINDS)
    return sorted(all_of(interventions), key=lambda one: order.index(one[0]))[:most]


def all_of(interventions: Table) -> list[tuple[str, str]]:
    """Kind and name of every intervention; one name can be of two kinds."""
    pairs = zip(map(str, interventions["kind"]), map(str, interventions["intervention"]), strict=True)
    return list(dict.fromkeys(pairs))


def explained(interventions: Table, modes: Sequence[str]) -> str:
    """What responds in each mode, in words."""
    said = []
    for mode in modes:
        part = rows(interventions, mode=mode)
        if not len(part["up_to"]):
            continue
        last = sorted(set(part["up_to"].tolist()))
        held = [name for name in ("attention", "norms") if str(part[name][0]) == "frozen"]
        what = f"{' and '.join(held)} frozen" if held else "nothing frozen"
        layers = str(last[0]) if len(last) == 1 else f"{last[0]} to {last[-1]}"
        mlps = "all MLPs respond" if last == [-1] else f"MLPs up to layer {layers} do not respond"
        said.append(f"{mode}: {what}, {mlps}")
    return "; ".join(said) + "." if said else ""


def _probabilities(axes: Axes, part: Table, name: str, style: Style, width: float) -> None:
    most = np.maximum(part["probability_before"], part["probability_after"])
    order = np.argsort(-most, kind="stable")[:TOKENS]
    order = order[np.argsort(part["probability_before"][order], kind="stable")]
    before, after = part["probability_before"][order], part["probability_after"][order]
    for height, (start, end) in enumerate(zip(before, after, strict=True)):
        colour = style.palette.positive if end > start else style.palette.negative
        axes.plot([start, end], [height, height], color=colour, linewidth=1.4, alpha=0.7, zorder=1)
    heights = np.arange(len(order))
    axes.plot(before, heights, "o", color=style.palette.muted, markersize=5, label="before", zorder=2)
    axes.plot(after, heights, "D", color=style.palette.text, markersize=4.5, label="after", zorder=3)
    axes.set_yticks(heights, shown(map(str, part["text"][order])))
    axes.set_ylim(-0.7, len(order) - 0.3)
    log_axis(axes, "x", [*before, *after])
    axes.set_xlabel("probability")
    size = style.font_size
    few_ticks(axes, width, size)
    operation = fitting(drawable(str(part["operation"][0])), width, size * SMALL)
    axes.set_title(f"{fitting(drawable(name), width, size)}\n{operation} ({int(part['held'][0])} held)")
    grid(axes, "x")


def few_ticks(axes: Axes, width: float, size: float) -> None:
    """Leave out ticks of a logarithmic x axis, ``width`` inches long, until their labels do not meet."""
    if axes.get_xscale() != "log":
        return
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    named = axes.xaxis.get_major_formatter().format_ticks(ticks)
    places = width * np.log(np.array(ticks) / low) / np.log(high / low)
    half = np.array([text_width(name, size) + size / 72 for name in named]) / 2
    for step in range(1, len(ticks) + 1):
        left, right = (places - half)[::step], (places + half)[::step]
        if (left[1:] >= right[:-1]).all():
            axes.xaxis.set_major_locator(FixedLocator(ticks[::step]))
            return


def _agreement(axes: Axes, part: Table, fit: Table, style: Style) -> int:
    """Marks of every target; how many are not seen."""
    x, y = part["predicted"].astype(float), part["measured"].astype(float)
    known = np.isfinite(x) & np.isfinite(y)
    axes.axhline(0, color=style.palette.grid, linewidth=0.8, zorder=0)
    axes.axvline(0, color=style.palette.grid, linewidth=0.8, zorder=0)
    for kind, (marker, colour) in reversed(KINDS.items()):
        here = known & (part["kind"] == kind)
        if here.any():
            look: dict[str, Any] = {"color": getattr(style.palette, colour), "markeredgewidth": 0}
            axes.plot(x[here], y[here], marker, markersize=3, alpha=0.55, label=kind, rasterized=True, **look)
    if known.any():
        ends = frame(x[known], y[known])
        axes.plot(ends, ends, "--", color=style.palette.muted, linewidth=0.9, zorder=0)
        axes.set(xlim=ends, ylim=ends)
        known &= (y >= ends[0]) & (y <= ends[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
    grid(axes, "both")
    return int((~known).sum())


def frame(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Ends of both axes: all of x, and of y what does not lie far beyond."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    reach = 1.5 * (high - low) or 1e-3
    near = y[(y >= low - reach) & (y <= high + reach)]
    if len(near):
        low, high = min(low, float(near.min())), max(high, float(near.max()))
    margin = 0.05 * (high - low) or 1e-3
    return low - margin, high + margin


def _said(fit: Table) -> str:
    """r and slope over all interventions, and over those of single features where there are others too."""
    kinds = ["all", "feature"] if len(set(map(str, fit["kind"]))) > 2 else ["all"]
    said = []
    for kind in kinds:
        part = rows(fit, kind=kind)
        name = "" if len(kinds) == 1 else "all: " if kind == "all" else "single: "
        if not len(part["n"]) or not np.isfinite(part["pearson"][0]):
            said.append(f"{name}too few effects")
            continue
        r, slope = float(part["pearson"][0]), float(part["slope"][0])
        low, high = part["pearson_low"][0], part["pearson_high"][0]
        around = interval(part["slope_low"][0], part["slope_high"][0])
        said.append(f"{name}r {fixed(r, 2)} {interval(low, high)}, slope {number(slope)} {around}".rstrip())
    return "\n".join(said)

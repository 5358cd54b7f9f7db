"""Figure: what a circuit's nodes and edges truly do, what those outside of it do, and how much may have been missed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from circuitflow.jobs import Output
from circuitflow.plots.numbers import counted, number, percent, whole
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows, unit_of
from circuitflow.store.tables import read_table

SIDES = {"inside": "in the circuit", "outside": "outside"}
STRATA = ("error", "top", "middle", "random")
SHADES = {"error": 1.0, "top": 0.78, "middle": 0.5, "random": 0.28}
LEAST = 1e-4
"""Share of the largest effect below which marks lie at the frame's edge."""
NOTE = (
    "Each mark is a {unit_of} patched alone, n = {n} test pairs; bars: 95 % intervals over pairs; hollow: effect and "
    "score "
    "have different signs; on the dashed line both agree; dotted: the weakest |effect| "
    "measured in the circuit. Right: Σ|effect| "
    "of all single {plural}, estimated from {measured} measured (of {population}): errors and the strongest all, "
    "middle "
    "and rest at random; whisker: one-sided 95 % bound (approximate). Single effects need not add up to a joint one."
)


def plot_audit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. True effects against scores inside and outside of the circuit, and their estimated sums.

    Inputs ``summary``, ``nodes``, ``edges`` (tables of audit_circuit); params ``style``, optionally ``metric``; outputs
    ``png``, ``svg``.
    """
    style = style_of(params)
    tables = {name: read_table(inputs[name]) for name in ("summary", "nodes", "edges")}
    with drawing(style):
        save(
            draw(tables["summary"], tables["nodes"], tables["edges"], style, unit_of(params.get("metric"))),
            out,
            style,
        )


def draw(summary: Table, nodes: Table, edges: Table, style: Style, unit: str = "logits") -> Figure:
    """The figure, from the three tables."""
    figure = new_figure(10.5, 8.2)
    grid_of = figure.subplots(2, 2, width_ratios=[1.35, 1.0])
    for row, (what, table) in enumerate((("nodes", nodes), ("edges", edges))):
        part = rows(summary, what=what)
        left, right = grid_of[row]
        _scatter(left, table, part, what, style)
        left.set(xlabel=f"|score| ({unit})", ylabel=f"|effect of patching| ({unit})")
        _sums(right, part, what, style)
        right.set_xlabel(f"Σ|effect| ({unit})")
    outside = rows(summary, stratum="all")
    said = NOTE.format(
        n=int(summary["n"].max(initial=0)),
        unit_of="node or edge",
        plural="nodes or edges",
        measured=whole(float(outside["measured"].sum())),
        population=whole(float(outside["population"].sum())),
    )
    footnote(figure, f"{said}\n{_conservation(summary, unit)}", style)
    return figure


def verdicts(summary: Table) -> dict[str, str]:
    """By "nodes" and "edges", what lies outside: a sentence to stand beside any picture of the circuit."""
    found = {}
    for what in ("nodes", "edges"):
        part = rows(summary, what=what, side="outside", stratum="all")
        share, upper = (
            float(part[name][0]) if len(part[name]) else np.nan for name in ("share", "share_upper")
        )
        if np.isfinite(share):
            bound = f", at most {percent(upper)} (95 %, for these pairs)"
            if everything_measured(summary, what):
                bound = " (all measured, for these pairs)"
            found[what] = f"{percent(share)} of Σ|effect| lies outside{bound}"
    return found


def everything_measured(summary: Table, what: str) -> bool:
    """Whether all nodes (or edges) were measured, in and out of the circuit, so that nothing is estimated."""
    part = rows(summary, what=what, stratum="all")
    return bool((part["measured"] == part["population"]).all())


def remark(summary: Table) -> str:
    """One sentence for the foot of a drawing of the circuit; empty if nothing was measured."""
    found = "; ".join(f"{what}, {said}" for what, said in verdicts(summary).items())
    n = int(summary["n"].max(initial=0))
    return f"Audit: {found}; each patched alone, on {counted(n, 'test pair')}." if found else ""


def sentences(summary: Table, unit: str = "logits") -> list[str]:
    """What the audit says, to stand under a drawing of the circuit: nodes, edges, conservation."""
    said = []
    for what, found in verdicts(summary).items():
        part = {side: rows(summary, what=what, side=side, stratum="all") for side in SIDES}
        count = {
            side: " of ".join(whole(float(here[name][0])) for name in ("measured", "population"))
            for side, here in part.items()
        }
        pairs = counted(int(part["outside"]["n"][0]), "test pair")
        said.append(
            f"{what.capitalize()}: {found}; {count['outside']} outside and {count['inside']} in the circuit patched "
            f"alone, on {pairs}."
        )
    return [*said, _conservation(summary, unit)]


def _scatter(axes: Axes, table: Table, summary: Table, what: str, style: Style) -> None:
    top = float(np.abs(np.concatenate([table["exact"], table["score"]])).max(initial=0)) or 1.0
    low = top * LEAST
    axes.plot([low, top], [low, top], "--", color=style.palette.muted, linewidth=0.9, zorder=0)
    for inside, colour in ((False, style.palette.random), (True, style.palette.circuit)):
        part = rows(table, inside=inside)
        _marks(axes, part, colour, low)
    threshold = float(summary["threshold"].max(initial=0))
    if threshold > low:
        axes.axhline(threshold, color=style.palette.muted, linewidth=0.9, linestyle=":")
    for which in "xy":
        log_axis(axes, which, [low, top])
    grid(axes, "both")
    axes.set_title(f"{what.capitalize()}: effect against score")
    axes.legend(handles=_keys(table, style), loc="upper left", handletextpad=0.2)


def _marks(axes: Axes, part: Table, colour: str, low: float) -> None:
    agrees = np.sign(part["exact"]) * np.sign(part["score"]) >= 0
    size, score = np.maximum(np.abs(part["exact"]), low), np.maximum(np.abs(part["score"]), low)
    ends = np.stack([np.abs(part["low"]), np.abs(part["high"])])
    crosses = np.sign(part["low"]) != np.sign(part["high"])
    bottom = np.where(crosses, low, ends.min(0)).clip(low)
    spread = np.maximum([size - bottom, ends.max(0) - size], 0)
    wide = part["kind"] == "error" if "kind" in part else np.zeros(len(size), bool)
    for errors in (False, True):
        for same in (True, False):
            here = (wide == errors) & (agrees == same)
            look: dict[str, Any] = {"color": colour, "markersize": 6.5 if errors else 4, "elinewidth": 0.6}
            look |= {"markerfacecolor": colour if same else "none", "markeredgewidth": 0.8, "alpha": 0.75}
            if here.any():
                axes.errorbar(
                    score[here], size[here], yerr=spread[:, here], fmt="^" if errors else "o", **look
                )


def _keys(table: Table, style: Style) -> list[Line2D]:
    keys = []
    for side, colour in (("inside", style.palette.circuit), ("outside", style.palette.random)):
        count = int((table["inside"] == (side == "inside")).sum())
        keys.append(Line2D([], [], marker="o", linestyle="", color=colour, label=f"{SIDES[side]} ({count})"))
    if "kind" in table:
        keys.append(Line2D([], [], marker="^", linestyle="", color=style.palette.muted, label="error nodes"))
    return keys


def _sums(axes: Axes, summary: Table, what: str, style: Style) -> None:
    for height, side in enumerate(("outside", "inside")):
        left = 0.0
        colour = style.palette.circuit if side == "inside" else style.palette.random
        for stratum in STRATA:
            part = rows(summary, side=side, stratum=stratum)
            value = float(np.nan_to_num(part["estimate"]).sum())
            look: dict[str, Any] = {"color": colour, "alpha": SHADES[stratum], "linewidth": 0}
            axes.barh(height, value, 0.5, left=left, **look)
            left += value
        total = rows(summary, side=side, stratum="all")
        upper = float(total["upper"][0])
        if np.isfinite(upper) and upper > left:
            axes.errorbar(
                left,
                height,
                xerr=np.array([[0.0], [upper - left]]),
                color=style.palette.text,
                capsize=3,
                linewidth=1.1,
            )
        said = f"{number(left)}" + (f", at most {number(upper)}" if upper > left else "")
        counts = f"{whole(float(total['measured'][0]))} of {whole(float(total['population'][0]))} measured"
        text: dict[str, Any] = {"va": "bottom", "fontsize": style.font_size * 0.85}
        axes.text(0, height + 0.28, f"{SIDES[side]}: {said} ({counts})", **text)
    axes.set_ylim(-0.45, 1.75)
    axes.set_xlim(left=0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    grid(axes, "x")
    title = verdicts(summary).get(what, what.capitalize())
    axes.set_title(title.replace(" lies outside, ", " lies outside,\n").replace(" (all", "\n(all"))
    swatches = [
        Line2D([], [], marker="s", linestyle="", color=style.palette.muted, alpha=SHADES[name], label=name)
        for name in STRATA
    ]
    axes.legend(handles=swatches, loc="upper right", ncols=4, columnspacing=0.8, handletextpad=0.1)


def _conservation(summary: Table, unit: str) -> str:
    residual, relative = (float(summary[name][0]) for name in ("residual", "relative"))
    bound = rows(summary, what="nodes", side="outside", stratum="all")
    beyond = ""
    if len(bound["beyond"]):
        count, whole_count, most = (
            whole(float(bound[name][0])) for name in ("beyond", "population", "beyond_upper")
        )
        least = f"than the weakest measured in the circuit ({number(float(bound['threshold'][0]), 2)} {unit})"
        if bound["measured"][0] == bound["population"][0]:
            beyond = f" Outside, {count} of all {whole_count} nodes have a larger |effect| {least}."
        else:
            beyond = (
                f" Outside, {count} measured nodes have a larger |effect| {least}; of all {whole_count} at most {most} "
                "(95 %, exact)."
            )
    if not np.isfinite(residual):
        return f"The circuit does not tell how far its edges conserve effects.{beyond}"
    return (
        f"Conservation: a node's edges sum to its score up to {number(residual, 2)} {unit} at worst, "
        f"{number(relative, 2)} of "
        f"the largest.{beyond}"
    )

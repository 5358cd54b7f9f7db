"""Figure: how well node methods agree with the reference (exact patching), per site and node by node."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.numbers import fixed, number
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows, unit_of
from circuitflow.store.tables import read_table

NAMES = {
    "exact": "exact patching",
    "atp": "AtP",
    "ig": "integrated gradients",
    "relp": "RelP",
    "decoder_only": "decoder only",
    "sae_in_loop": "SAE in the loop",
}
COLOURS = ("#0f6e84", "#c1521f", "#6c4fa3", "#7a7f87", "#a07400", "#1c2024")
MARKERS = "osDv^P"
ACROSS = 3
SLOPES = (-0.5, 2.5)
MANY = 2000
NOTE = (
    "Above: agreement of each method's node scores with {reference} of the same nodes, per site, with 95 % intervals "
    "over pairs; 1 is perfect for both (slope: least squares of {reference} on the method, through the origin). "
    "n: {n} nodes per site.{cut} Below: one mark per node of all sites; on the dashed line both agree.{unsigned}"
)


def plot_methods(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Pearson correlation and slope against the reference by site and method, and the scores themselves.

    Inputs ``agreement`` and ``nodes`` (tables of compare_methods); params ``style``, optionally ``metric``; outputs
    ``png``, ``svg``.
    """
    style = style_of(params)
    agreement, nodes = (read_table(inputs[name]) for name in ("agreement", "nodes"))
    with drawing(style):
        save(draw(agreement, nodes, style, unit_of(params.get("metric"))), out, style)


def draw(agreement: Table, nodes: Table, style: Style, unit: str = "logits") -> Figure:
    """The figure, from both tables."""
    methods = once(agreement)
    names = list(dict.fromkeys(map(str, methods["method"])))
    reference = next(iter(map(str, methods["reference"])), "exact")
    against = NAMES.get(reference, reference)
    lines = max(1, -(-len(names) // ACROSS))
    figure = new_figure(10.5, 5.6 + 3.3 * lines)
    heights = [1.0, 1.0] + [1.4] * lines
    spec = figure.add_gridspec(2 + lines, min(ACROSS, max(len(names), 1)), height_ratios=heights)
    pearson, slope = (figure.add_subplot(spec[row, :]) for row in range(2))
    by_site(pearson, methods, names, "pearson", style)
    by_site(slope, methods, names, "slope", style)
    pearson.set(title=f"Pearson correlation with {against}", ylabel="r")
    pearson.set_ylim(top=1.03)
    pearson.tick_params(labelbottom=False)
    pearson.legend(loc="lower right", ncols=max(len(names), 1), bbox_to_anchor=(1, 1), borderaxespad=0.1)
    slope.set(title=f"Slope against {against}", ylabel="reference / method")
    outside = bounded(slope, methods["slope"])
    for place, name in enumerate(names):
        axes = figure.add_subplot(spec[2 + place // ACROSS, place % ACROSS])
        _scatter(axes, rows(nodes, method=name), name, style)
        axes.set(xlabel=f"{against} ({unit})", ylabel=f"score ({unit})")
    footnote(figure, _note(methods, names, against, outside), style)
    return figure


def once(agreement: Table) -> dict[str, np.ndarray]:
    """One row per site and method of a table that repeats them for every k of its overlaps."""
    first: dict[tuple[str, str], int] = {}
    for row, (site, method) in enumerate(zip(agreement["site"], agreement["method"], strict=True)):
        first.setdefault((str(site), str(method)), row)
    return {name: column[list(first.values())] for name, column in agreement.items()}


def _note(methods: Table, names: Sequence[str], against: str, outside: int) -> str:
    counts = sorted({int(n) for n in methods["n"]}) or [0]
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    cut = f" {outside} slopes lie outside the frame." if outside else ""
    unsigned = (
        f" Decoder only has no sign: it is compared with |{against}|." if "decoder_only" in names else ""
    )
    return NOTE.format(reference=against, n=n, cut=cut, unsigned=unsigned)


def by_site(axes: Axes, methods: Table, names: Sequence[str], what: str, style: Style) -> None:
    """One mark with its interval per site and method, around a line at 1."""
    sites = in_depth_order(methods["site"])
    place = {site: depth for depth, site in enumerate(sites)}
    for order, name in enumerate(names):
        part = rows(methods, method=name)
        value, low, high = (part[f"{what}{end}"] for end in ("", "_low", "_high"))
        x = np.array([place[str(site)] for site in part["site"]])
        look: dict[str, Any] = {
            "fmt": MARKERS[order % len(MARKERS)],
            "color": COLOURS[order % len(COLOURS)],
            "markersize": 4,
            "elinewidth": 1.1,
            "label": NAMES.get(name, name),
        }
        spread = np.nan_to_num(np.maximum([value - low, high - value], 0))
        axes.errorbar(x + 0.16 * (order - (len(names) - 1) / 2), value, yerr=spread, **look)
    axes.axhline(1, color=style.palette.muted, linewidth=0.9, linestyle="--", zorder=0)
    axes.set_xlim(-0.6, len(sites) - 0.4)
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(sites)), sites, **(turned if len(sites) > 9 else {}))
    grid(axes)


def bounded(axes: Axes, slopes: np.ndarray) -> int:
    """Keep slopes that are far off from squeezing all others; how many are not seen."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, SLOPES[0]), min(high, SLOPES[1]))
    return int(((slopes < SLOPES[0]) | (slopes > SLOPES[1])).sum())


def _scatter(axes: Axes, nodes: Table, name: str, style: Style) -> None:
    known = np.isfinite(nodes["score"]) & np.isfinite(nodes["reference"])
    table = {key: column[known] for key, column in nodes.items()}
    size = float(np.abs(np.concatenate([table["reference"], table["score"]])).max(initial=0)) * 1.08 or 1.0
    line: dict[str, Any] = {"linewidth": 0.9, "linestyle": "--", "zorder": 0}
    axes.plot([-size, size], [-size, size], color=style.palette.muted, **line)
    palette = style.palette
    for kind, marker, colour, area in (
        ("feature", "o", palette.feature, 14),
        ("error", "^", palette.error, 34),
    ):
        part = rows(table, kind=kind)
        count = len(part["score"])
        axes.scatter(
            part["reference"],
            part["score"],
            s=area,
            marker=marker,
            color=colour,
            alpha=0.55 if kind == "feature" else 0.9,
            linewidths=0,
            label=f"{kind}s (n = {count})",
            rasterized=count > MANY,
        )
    axes.set(xlim=(-size, size), ylim=(-size, size))
    axes.set_title(f"{NAMES.get(name, name)}: r = {_pearson(table['reference'], table['score'])}, all sites")
    axes.legend(loc="upper left", handletextpad=0.1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 2)))
    grid(axes, "both")


def _pearson(first: np.ndarray, second: np.ndarray) -> str:
    if len(first) < 2 or not first.std() or not second.std():
        return "–"
    return fixed(float(np.corrcoef(first, second)[0, 1]), 3)

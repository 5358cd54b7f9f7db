"""Figure: what patching a node truly does against its score, site by site, with the regression of each site."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.methods import NAMES, bounded, by_site
from circuitflow.plots.numbers import MINUS, fixed, number
from circuitflow.plots.scales import log_axis
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_provenance, read_table

ACROSS = 4
PANELS = 12
EVERYWHERE = "all"
NOTE = (
    "Effect: (m patched − m clean) / (m corrupt − m clean) of a node patched alone (for the metric kl, which is flat "
    "on the clean run: by putting it back to its clean value in the patched one); score: the method's estimate of it. "
    "Above: r, and slope by least squares with intercept, per site and method, with 95 % intervals over pairs; 1 is "
    "right. Below: {method}; a mark is a node ({nodes} in all), bars are 95 % intervals of its effect, the dashed "
    "line is "
    "effect = score, the full line the site's regression. n = {pairs} pairs; {aggregate}. Nodes: the error and the "
    "strongest features by AtP of every site.{cut}{left}"
)
AGGREGATES = {
    "ratio_of_means": "effects are averaged before the division",
    "mean_of_ratios": "effects are averaged after the division",
}


def plot_validation(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. r and slope by site and method, and effects against scores of one method.

    Inputs ``validation`` and ``nodes`` (tables of validate_scores); params ``style``, optionally ``method`` (whose
    nodes are shown; the first of the table); outputs ``png``, ``svg``.
    """
    style = style_of(params)
    table, nodes = (read_table(inputs[name]) for name in ("validation", "nodes"))
    conventions = read_provenance(inputs["validation"]).get("conventions", {})
    with drawing(style):
        save(draw(table, nodes, conventions, style, params.get("method")), out, style)


def draw(
    table: Table, nodes: Table, conventions: Mapping[str, Any], style: Style, method: str | None = None
) -> Figure:
    """The figure, from both tables."""
    names = list(dict.fromkeys(map(str, table["method"])))
    shown = method if method in names else names[0]
    sites = in_depth_order(site for site in table["site"] if site != EVERYWHERE)
    panels = spread(sites, PANELS)
    across = min(ACROSS, len(panels))
    lines = -(-len(panels) // across)
    figure = new_figure(10.5, 4.6 + 2.7 * lines)
    spec = figure.add_gridspec(2 + lines, across, height_ratios=[1.0, 1.0] + [1.45] * lines)
    by_line = rows(table, kind="both")
    single = {name: column[by_line["site"] != EVERYWHERE] for name, column in by_line.items()}
    outside = _summary(figure, spec, single, names, style)
    for place, site in enumerate(panels):
        axes = figure.add_subplot(spec[2 + place // across, place % across])
        _panel(axes, rows(nodes, method=shown, site=site), rows(by_line, method=shown, site=site), style)
        axes.set_title(_title(site, rows(by_line, method=shown, site=site)))
        if place // across == lines - 1 or place + across >= len(panels):
            axes.set_xlabel(f"score ({NAMES.get(shown, shown)}, share)")
        if place % across == 0:
            axes.set_ylabel("effect of patching (share)")
        if not place:
            axes.legend(loc="best", handletextpad=0.1, borderaxespad=0.2)
    cut = f" {outside} slopes lie outside the frame." if outside else ""
    left = f" {len(panels)} of {len(sites)} sites are shown below." if len(panels) < len(sites) else ""
    note = NOTE.format(
        method=NAMES.get(shown, shown),
        nodes=len(rows(nodes, method=shown)["score"]),
        pairs=int(table["pairs"].max()),
        aggregate=AGGREGATES.get(str(conventions.get("aggregate")), "shares of the whole effect"),
        cut=cut,
        left=left,
    )
    footnote(figure, note, style)
    return figure


def spread(sites: Sequence[str], most: int) -> list[str]:
    """At most so many sites, evenly over the depth, the first and the last among them."""
    if len(sites) <= most:
        return list(sites)
    return [sites[round(i)] for i in np.linspace(0, len(sites) - 1, most)]


def _summary(figure: Figure, spec: Any, table: Table, names: Sequence[str], style: Style) -> int:
    """The two rows by site; how many slopes are not seen."""
    pearson, slope = (figure.add_subplot(spec[row, :]) for row in range(2))
    by_site(pearson, table, names, "pearson", style)
    by_site(slope, table, names, "slope", style)
    pearson.set(title="Pearson correlation of effects and scores", ylabel="r")
    low = min(pearson.get_ylim()[0], 0.9)
    pearson.set_ylim(low, 1 + 0.02 * (1 - low))
    pearson.set_yticks([tick for tick in pearson.get_yticks() if low <= tick <= 1 + 1e-9])
    pearson.tick_params(labelbottom=False)
    pearson.legend(loc="lower right", ncols=max(len(names), 1), bbox_to_anchor=(1, 1), borderaxespad=0.1)
    slope.set(title="Slope of effects on scores", ylabel="effect / score")
    known = table["slope"][np.isfinite(table["slope"])]
    if not len(known) or known.min() <= 0:
        return bounded(slope, table["slope"])
    lower, upper = (table[name][np.isfinite(table[name])] for name in ("slope_low", "slope_high"))
    log_axis(slope, "y", [1.0, *known, *lower[lower > 0], *upper])
    return 0


def _panel(axes: Axes, nodes: Table, fit: Table, style: Style) -> None:
    axes.axhline(0, color=style.palette.grid, linewidth=0.8, zorder=0)
    for kind, marker, colour, size in (
        ("feature", "o", style.palette.feature, 3.6),
        ("error", "^", style.palette.error, 6.0),
    ):
        part = rows(nodes, kind=kind)
        if not len(part["score"]):
            continue
        spread_of = np.maximum([part["effect"] - part["low"], part["high"] - part["effect"]], 0)
        look: dict[str, Any] = {"fmt": marker, "color": colour, "markersize": size, "markeredgewidth": 0}
        label = f"{kind}s ({len(part['score'])})"
        axes.errorbar(
            part["score"], part["effect"], yerr=spread_of, elinewidth=0.8, alpha=0.75, label=label, **look
        )
    scores = nodes["score"]
    if not len(scores):
        return
    ends = np.array([scores.min(), scores.max()])
    ends += np.array([-1, 1]) * (0.06 * (ends[1] - ends[0]) or 1e-3)
    axes.set_ylim(axes.get_ylim())
    axes.plot(ends, ends, "--", color=style.palette.muted, linewidth=0.9, zorder=0)
    if np.isfinite(fit["slope"]).all() and len(fit["slope"]):
        axes.plot(ends, fit["intercept"][0] + fit["slope"][0] * ends, color=style.palette.text, linewidth=1.0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
    grid(axes, "both")


def _title(site: str, fit: Table) -> str:
    if not len(fit["slope"]) or not np.isfinite(fit["slope"][0]):
        return site
    return f"{site}: r = {fixed(float(fit['pearson'][0]))}, slope {number(float(fit['slope'][0]), 3)}"

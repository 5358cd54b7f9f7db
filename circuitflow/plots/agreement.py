"""Figure: whether the nodes that matter on the training pairs matter on the test pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, site_shades, style_of
from circuitflow.plots.tables import Table, rows, unit_of
from circuitflow.store.tables import read_table

DODGE = 1.04  # factor between the places of neighbouring sites, so that equal overlaps do not hide each other
NOTE = (
    "Left: one mark per node, symmetric log scale; on the line the splits agree. Right: share of the top "
    "k nodes by |IE| on train that are also among the top k on test, with 95 % bootstrap intervals over "
    "test pairs. Spearman: {spearman}. Nodes (n): {ranked}."
)


def plot_agreement(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Scores on test against scores on train, and the overlap of the top k.

    Inputs ``nodes`` and ``agreement`` (tables of rank_features); params ``style``, optionally
    ``metric``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        metric = params.get("metric")
        unit = unit_of(metric) if metric else "units of m"
        save(draw(read_table(inputs["nodes"]), read_table(inputs["agreement"]), style, unit), out, style)


def draw(nodes: Table, agreement: Table, style: Style, unit: str = "units of m") -> Figure:
    """The figure, from the tables of nodes and of agreement."""
    sites = in_depth_order(agreement["site"])
    figure = new_figure(7.4, 3.7)
    left, right = figure.subplots(1, 2)
    _scatter(left, nodes, style, unit)
    _overlap(right, agreement, sites, style)
    counts = {site: int(rows(agreement, site=site)["nodes"][0]) for site in sites}
    ranked = ", ".join(f"{site} {count}" for site, count in counts.items())
    footnote(figure, NOTE.format(spearman=_spearman(agreement, sites), ranked=ranked), style)
    return figure


def _scatter(axes: Axes, nodes: Table, style: Style, unit: str) -> None:
    scores = np.concatenate([nodes["score_train"], nodes["score_test"]])
    size = float(np.abs(scores).max()) or 1.0
    linear = max(float(np.quantile(np.abs(scores), 0.5)), size * 1e-3)
    for kind, marker, colour in (
        ("feature", "o", style.palette.feature),
        ("error", "^", style.palette.error),
    ):
        part = rows(nodes, kind=kind)
        axes.scatter(
            part["score_train"],
            part["score_test"],
            s=16 if kind == "feature" else 34,
            marker=marker,
            color=colour,
            alpha=0.55 if kind == "feature" else 0.95,
            linewidths=0,
            label=f"{kind} nodes ({len(part['score_train'])})",
            rasterized=len(scores) > 4000,
        )
    limit = size * 1.5
    axes.plot(
        [-limit, limit], [-limit, limit], color=style.palette.muted, linewidth=0.8, linestyle="--", zorder=0
    )
    for set_scale, axis in ((axes.set_xscale, axes.xaxis), (axes.set_yscale, axes.yaxis)):
        set_scale("symlog", linthresh=linear, linscale=0.5)
        axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, linear)))
        axis.set_minor_formatter(NullFormatter())
    axes.set(
        xlim=(-limit, limit),
        ylim=(-limit, limit),
        title="Node scores",
        xlabel=f"IE on train ({unit})",
        ylabel=f"IE on test ({unit})",
    )
    axes.legend(loc="upper left", handletextpad=0.1)
    grid(axes, "both")


def _overlap(axes: Axes, agreement: Table, sites: Sequence[str], style: Style) -> None:
    for number, (shade, site) in enumerate(zip(site_shades(len(sites)), sites, strict=True)):
        part = rows(agreement, site=site)
        order = np.argsort(part["k"])
        k, overlap, low, high = (part[name][order] for name in ("k", "overlap", "low", "high"))
        beside = DODGE ** (number - (len(sites) - 1) / 2)
        spread = np.maximum([overlap - low, high - overlap], 0)
        look: dict[str, Any] = {
            "color": shade,
            "markersize": 4,
            "linewidth": 1.2,
            "elinewidth": 1,
            "capsize": 2,
        }
        axes.errorbar(k * beside, overlap, yerr=spread, fmt="o-", label=site, **look)
    axes.set_xscale("log")
    ticks = sorted({int(k) for k in agreement["k"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(ylim=(0, 1.03), title="Overlap of the top k", xlabel="k", ylabel="share in common")
    axes.legend(title="site", loc="lower right")
    grid(axes)


def _spearman(agreement: Table, sites: Sequence[str]) -> str:
    return ", ".join(f"{site} {rows(agreement, site=site)['spearman'][0]:.2f}" for site in sites)


def _tick(value: float, linear: float) -> str:
    """Ticks next to 0 stay bare: on a symmetric log scale their labels would lie on each other."""
    return "" if 0 < abs(value) < 4 * linear else f"{value:g}".replace("-", "−")

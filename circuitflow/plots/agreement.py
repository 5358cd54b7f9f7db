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
from circuitflow.plots.tables import Table, pair_counts, rows, unit_of
from circuitflow.store.tables import read_table

APART = 0.5
"""Room that the marks of one site take, of the room between two."""
FEW = 5
"""Sites up to which their names stand level."""
NOTE = (
    "Left: one mark per node, symmetric log scale; on the line the splits agree. Right, above: share of the top k "
    "nodes by |IE| on train that are also among the top k on test; below: correlation of |IE| over all nodes of a "
    "site, whose number stands behind its name. Bars: 95 % bootstrap intervals over test pairs. n = {n}."
)


def plot_agreement(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Scores on test against scores on train, and by site the overlap of the top k and Spearman's correlation.

    Inputs ``nodes``, ``agreement`` and ``layers`` (tables of rank_features); params ``style``, optionally
    ``metric``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        metric = params.get("metric")
        unit = unit_of(metric) if metric else "units of m"
        nodes, agreement, layers = (read_table(inputs[name]) for name in ("nodes", "agreement", "layers"))
        save(draw(nodes, agreement, layers, style, unit), out, style)


def draw(nodes: Table, agreement: Table, layers: Table, style: Style, unit: str = "units of m") -> Figure:
    """The figure, from the tables of nodes, of agreement and of layers (which has the numbers of pairs)."""
    sites = in_depth_order(agreement["site"])
    wide = max(3.7, 0.6 + 0.3 * len(sites))
    figure = new_figure(4.2 + wide, 4.7)
    places = figure.add_gridspec(2, 2, width_ratios=[4.2, wide], height_ratios=[1.3, 1])
    _scatter(figure.add_subplot(places[:, 0]), nodes, style, unit)
    above = figure.add_subplot(places[0, 1])
    below = figure.add_subplot(places[1, 1], sharex=above)
    _overlap(above, agreement, sites)
    _correlation(below, agreement, sites, style)
    above.tick_params(labelbottom=False)
    footnote(figure, NOTE.format(n=pair_counts(layers)), style)
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


def _overlap(axes: Axes, agreement: Table, sites: Sequence[str]) -> None:
    """One series per k; where k is all nodes of a site there is nothing to tell."""
    telling = {name: column[agreement["k"] < agreement["nodes"]] for name, column in agreement.items()}
    series = sorted({int(k) for k in telling["k"]})
    for number, (shade, k) in enumerate(zip(site_shades(len(series)), series, strict=True)):
        part = rows(telling, k=k)
        beside = APART * ((number + 0.5) / len(series) - 0.5)
        _marks(axes, part, sites, "overlap", ("low", "high"), beside, color=shade, label=f"k = {k:,}")
    axes.set(ylim=(0, 1.03), title="Agreement of the splits by site", ylabel="overlap of the top k")
    if series:
        axes.legend(loc="best", ncols=len(series), handletextpad=0.1)
    grid(axes)


def _correlation(axes: Axes, agreement: Table, sites: Sequence[str], style: Style) -> None:
    first = {name: [rows(agreement, site=site)[name][0] for site in sites] for name in agreement}
    table = {name: np.array(values) for name, values in first.items()}
    ends = ("spearman_low", "spearman_high")
    _marks(axes, table, sites, "spearman", ends, 0, color=style.palette.feature)
    axes.axhline(0, color=style.palette.muted, linewidth=0.8)
    low = float(np.nanmin([*table["spearman"], *table["spearman_low"], 0]))
    axes.set(ylim=(min(1.1 * low, -0.03), 1.03), ylabel="Spearman")
    labels = [f"{site} ({int(n):,})" for site, n in zip(sites, table["nodes"], strict=True)]
    turned = 90 if len(sites) > FEW else 0
    axes.set_xticks(range(len(sites)), labels if turned else [name.replace(" ", "\n") for name in labels])
    axes.tick_params(axis="x", rotation=turned)
    axes.set_xlim(-0.6, len(sites) - 0.4)
    grid(axes)


def _marks(
    axes: Axes,
    table: Table,
    sites: Sequence[str],
    name: str,
    ends: tuple[str, str],
    beside: float,
    **look: Any,
) -> None:
    place = np.array([sites.index(site) for site in table["site"]])
    value, low, high = (table[column] for column in (name, *ends))
    axes.errorbar(
        place + beside,
        value,
        yerr=np.maximum([value - low, high - value], 0),
        fmt="o",
        markersize=4,
        elinewidth=1,
        capsize=2,
        **look,
    )


def _tick(value: float, linear: float) -> str:
    """Ticks next to 0 stay bare: on a symmetric log scale their labels would lie on each other."""
    return "" if 0 < abs(value) < 4 * linear else f"{value:g}".replace("-", "−")

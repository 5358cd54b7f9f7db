"""Figures: how well transcoders, or a crosscoder, do on held-out text, site by site."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.numbers import counted, number, whole
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, style_of
from circuitflow.plots.tables import Table, rows
from circuitflow.store.tables import read_table

ALL = "all"
NOTE = (
    "FVU: squared error over the variance of what the site holds (0 is perfect), {kept}, outliers left out. L0: active "
    "features a token. Dead: has not fired for dead_after training tokens; silent: active in no held-out token. "
    "Loss recovered: (replaced − zero)/(original − zero) of the cross-entropy with the site's vectors replaced by "
    "their reconstruction, {predicted}; attention runs on the changed stream; {outside}. Bars and band: 95 % bootstrap "
    "intervals over held-out blocks."
)
LIMITS = (-0.25, 1.25)
"""Of the axis of loss recovered: where zeros hardly hurt, the ratio is anything."""


def plot_spanning_quality(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. FVU and loss recovered by site written, L0 and dead features by site read.

    Input ``quality`` (a table of ``measure_family``); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    with drawing(style):
        save(draw(read_table(Path(inputs["quality"])), style), out, style)


def draw(table: Table, style: Style) -> Figure:
    """The figure, from the table."""
    figure = new_figure(7.8, 5.0)
    panels = figure.subplots(2, 2)
    written = in_depth_order(rows(table, quantity="fvu", tokens="kept")["site"])
    read = in_depth_order(rows(table, quantity="l0")["site"])
    colours = style.palette
    _series(panels[0, 0], rows(table, quantity="fvu", tokens="kept"), written, colours.circuit, style)
    panels[0, 0].set(title="Variance unexplained", ylabel="held-out FVU")
    _from_zero(panels[0, 0])
    _recovered(panels[0, 1], rows(table, quantity="ce_recovered"), written, style)
    _series(panels[1, 0], rows(table, quantity="l0"), read, colours.circuit, style)
    panels[1, 0].set(title="Active features per token", ylabel="L0")
    _from_zero(panels[1, 0])
    _dead(panels[1, 1], table, read, style)
    counts = {"kept": _n(table, "fvu", "kept"), "predicted": _n(table, "ce_recovered", "all")}
    footnote(figure, NOTE.format(**counts, outside=_outside(rows(table, quantity="ce_recovered"))), style)
    return figure


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def _outside(recovered: Table) -> str:
    """What of loss recovered the axis does not show."""
    value = recovered["value"].astype(float)
    names = [str(site) for site in recovered["site"][(value < LIMITS[0]) | (value > LIMITS[1])]]
    return f"beyond the axis: {', '.join(names)}" if names else "all values within the axis"


def _n(table: Table, quantity: str, tokens: str) -> str:
    n = rows(table, quantity=quantity, tokens=tokens)["n"]
    if not len(n):
        return "not measured"
    least, most = int(n.min()), int(n.max())
    return (
        f"n = {counted(most, 'token')}"
        if least == most
        else f"n = {whole(least)} to {counted(most, 'token')}"
    )


def _series(axes: Axes, found: Table, sites: list[str], colour: str, style: Style, label: str = "") -> None:
    """Values with their intervals, one a site."""
    order = [list(found["site"]).index(site) for site in sites if site in found["site"]]
    places = np.array([sites.index(str(found["site"][i])) for i in order], float)
    value, low, high = (found[name][order].astype(float) for name in ("value", "ci_low", "ci_high"))
    known = np.isfinite(low) & np.isfinite(high)
    axes.vlines(places[known], low[known], high[known], color=colour, linewidth=1.2, alpha=0.7)
    axes.plot(places, value, "o-", color=colour, markersize=3.4, linewidth=1.0, label=label)
    _sites(axes, sites, style)
    grid(axes)


def _sites(axes: Axes, sites: list[str], style: Style) -> None:
    """Names below the axis: layers where all sites are of one kind."""
    kinds = {site if "+" in site else site.partition(".")[0] for site in sites}
    one_kind = len(kinds) == 1 and "+" not in sites[0]
    names = [site.partition(".")[2] for site in sites] if one_kind else [_short(site) for site in sites]
    step = max(1, -(-len(sites) // 16))
    axes.set_xticks(range(0, len(sites), step), names[::step])
    axes.set_xlim(-0.6, len(sites) - 0.4)
    axes.set_xlabel(f"layer ({next(iter(kinds))})" if one_kind else "site")


def _short(site: str) -> str:
    parts = site.split("+")
    return site if len(parts) < 3 else f"{parts[0]} … {parts[-1]}"


def _recovered(axes: Axes, found: Table, sites: list[str], style: Style) -> None:
    axes.set(title="Loss recovered with the site replaced", ylabel="share of cross-entropy")
    if not len(found["value"]):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=style.palette.muted)
        axes.set(xticks=[], yticks=[])
        return
    _series(axes, found, sites, style.palette.circuit, style, "one site alone")
    together = rows(found, site=ALL)
    if len(together["value"]):
        value, low, high = (float(together[name][0]) for name in ("value", "ci_low", "ci_high"))
        colour = style.palette.complement
        axes.axhline(value, color=colour, linewidth=1.2, label=f"all at once: {number(value)}")
        if np.isfinite(low) and np.isfinite(high):
            axes.axhspan(low, high, color=colour, alpha=0.15, linewidth=0)
        axes.legend(loc="best")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, LIMITS[0]), min(high, LIMITS[1]))


def _dead(axes: Axes, table: Table, sites: list[str], style: Style) -> None:
    axes.set(title="Dead and silent features", ylabel="share of the dictionary")
    palette = style.palette
    for quantity, colour, label in (
        ("dead_share", palette.circuit, "dead (training)"),
        ("silent_share", palette.random, "silent (held-out)"),
    ):
        found = rows(table, quantity=quantity)
        if np.isfinite(found["value"].astype(float)).any():
            _series(axes, found, sites, colour, style, label)
    axes.set_ylim(0, max(0.02, 1.08 * axes.get_ylim()[1]))
    axes.legend(loc="best")

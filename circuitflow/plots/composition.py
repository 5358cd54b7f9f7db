"""Figure: what circuits of growing size are made of: features, errors, and of which sites."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from circuitflow.jobs import Output
from circuitflow.models.sites import in_depth_order
from circuitflow.plots.style import Style, drawing, footnote, grid, new_figure, save, site_shades, style_of
from circuitflow.plots.tables import ASSEMBLED, Table, rows
from circuitflow.store.tables import read_table

KINDS = {
    "feature": "features",
    "residual_error": "errors of the residual stream",
    "other_error": "other errors",
}
TITLES = {
    ("kind", "share"): "Kinds of node: share of nodes",
    ("kind", "strength_share"): "Kinds of node: share of Σ |IE|",
    ("site", "share"): "Sites: share of nodes",
    ("site", "strength_share"): "Sites: share of Σ |IE|",
}
MANY = 14
"""Sites of which a legend still names every one."""


def plot_composition(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Stacked shares of kinds of node and of sites against the number of nodes, and of the circuit itself.

    Input ``composition`` (table of compose_circuits); params ``style``; outputs ``png``, ``svg``.
    """
    style = style_of(params)
    table = read_table(inputs["composition"])
    with drawing(style):
        save(draw(table, style), out, style)


def draw(table: Table, style: Style) -> Figure:
    """The figure, from the table of compose_circuits."""
    sites = in_depth_order(table["site"])
    kinds = [kind for kind in KINDS if table["count"][table["kind"] == kind].sum()]
    palette = style.palette
    colours = {"feature": palette.feature, "residual_error": palette.error, "other_error": palette.complement}
    looks: dict[str, list[tuple[str, str, Any]]] = {
        "kind": [(kind, KINDS[kind], colours[kind]) for kind in kinds],
        "site": list(zip(sites, sites, site_shades(len(sites)), strict=True)),
    }
    figure = new_figure(9.6, 6.0)
    grid_of_axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for (column, what), axes in zip(TITLES, grid_of_axes.ravel(), strict=True):
        _stacked(axes, table, column, what, looks[column])
        axes.set_title(TITLES[column, what])
        if axes in grid_of_axes[:, 1]:
            handles, labels = axes.get_legend_handles_labels()
            step = -(-len(labels) // MANY)
            beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
            axes.legend(handles[::-step], labels[::-step], **beside)
        else:
            axes.set_ylabel("share of the circuit")
    for axes in grid_of_axes[1]:
        axes.set_xlabel("nodes in the circuit (★: the assembled circuit)")
    footnote(figure, _note(table), style)
    return figure


def _stacked(axes: Axes, table: Table, column: str, what: str, looks: Sequence[tuple[str, str, Any]]) -> None:
    sizes, names = _circuits(table)
    below = np.zeros(len(sizes))
    for value, label, colour in looks:
        part = rows(table, **{column: value})
        height = np.array(
            [
                part[what][(part["nodes"] == size) & ((part["source"] == ASSEMBLED) == own)].sum()
                for size, own in sizes
            ]
        )
        axes.bar(np.arange(len(sizes)), height, 0.84, bottom=below, color=colour, label=label, linewidth=0)
        below += height
    axes.set_xticks(range(len(sizes)), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_ylim(0, 1)
    grid(axes)


def _circuits(table: Table) -> tuple[list[tuple[int, bool]], list[str]]:
    """Every circuit as (nodes, whether it is the assembled one), by size, and what its bar is called."""
    own = table["source"] == ASSEMBLED
    sizes = sorted(set(zip(table["nodes"].tolist(), own.tolist(), strict=True)))
    return sizes, [f"{'★ ' if assembled else ''}{size:,}" for size, assembled in sizes]


def _note(table: Table) -> str:
    total = int(table["nodes"][table["source"] != ASSEMBLED].max())
    return (
        f"Circuits of the n strongest of {total:,} nodes with an effect on the training pairs, over all sites, and the "
        "assembled circuit. Shares are exact counts, so they have no intervals; Σ |IE| sums the nodes' scores."
    )

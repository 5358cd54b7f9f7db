"""Where the nodes of a circuit drawing go: one column per site, rows ordered so that strong edges cross little."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SWEEPS = 8


@dataclass(frozen=True)
class Grid:
    """Lengths of the drawing, in inches."""

    box: float
    height: float
    gap: float
    pitch: float
    left: float = 0.2
    top: float = 0.85
    bottom: float = 0.85
    metric: float = 1.15


@dataclass(frozen=True)
class Layout:
    """Centres of the nodes' left edges in inches from the lower left corner, and the size of the drawing."""

    places: dict[str, tuple[float, float]]
    columns: dict[str, float]
    metric: tuple[float, float]
    width: float
    height: float


def grid_for(columns: int, fullest: int) -> Grid:
    """Room per node: generous for a few sites, tighter where many have to fit."""
    box, gap = (2.1, 1.25) if columns <= 5 else (1.5, 0.95)
    return Grid(box=box, height=0.21, gap=gap, pitch=0.275 if fullest <= 30 else 0.245)


def place(
    columns: Mapping[str, Sequence[str]], edges: Sequence[tuple[str, str, float]]
) -> tuple[Grid, Layout]:
    """Places of all nodes.

    :param columns: node names by site, sites from left to right.
    :param edges: (upstream node, downstream node, weight); ends that are no node are ignored.
    """
    fullest = max((len(nodes) for nodes in columns.values()), default=1)
    grid = grid_for(len(columns), fullest)
    rows = _ordered(columns, edges)
    width = grid.left + len(columns) * (grid.box + grid.gap) + grid.metric
    height = grid.top + fullest * grid.pitch + grid.bottom
    middle = grid.bottom + fullest * grid.pitch / 2
    places, lefts = {}, {}
    for number, (site, nodes) in enumerate(rows.items()):
        lefts[site] = grid.left + number * (grid.box + grid.gap)
        for row, node in enumerate(nodes):
            places[node] = (lefts[site], middle + ((len(nodes) - 1) / 2 - row) * grid.pitch)
    return grid, Layout(places, lefts, (width - grid.metric, middle), width, height)


def _ordered(
    columns: Mapping[str, Sequence[str]], edges: Sequence[tuple[str, str, float]]
) -> dict[str, list[str]]:
    """Rows by the barycentre rule of layered drawings: each node goes to the weighted mean height of its neighbours."""
    rows = {site: list(nodes) for site, nodes in columns.items()}
    neighbours: dict[str, list[tuple[str, float]]] = {node: [] for nodes in rows.values() for node in nodes}
    for up, down, weight in edges:
        if up in neighbours and down in neighbours:
            neighbours[up].append((down, abs(weight)))
            neighbours[down].append((up, abs(weight)))
    heights = {node: height for nodes in rows.values() for node, height in _heights(nodes).items()}
    sites = list(rows)
    for sweep in range(SWEEPS):
        for site in sites if sweep % 2 == 0 else reversed(sites):
            wanted = {node: _barycentre(node, neighbours[node], heights) for node in rows[site]}
            rows[site].sort(key=wanted.__getitem__)
            heights.update(_heights(rows[site]))
    return rows


def _heights(nodes: Sequence[str]) -> dict[str, float]:
    return {node: row - (len(nodes) - 1) / 2 for row, node in enumerate(nodes)}


def _barycentre(node: str, neighbours: Sequence[tuple[str, float]], heights: Mapping[str, float]) -> float:
    total = sum(weight for _, weight in neighbours)
    if total == 0:
        return heights[node]
    return float(np.sum([heights[other] * weight for other, weight in neighbours]) / total)

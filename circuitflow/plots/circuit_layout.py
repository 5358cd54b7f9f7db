"""Where the nodes of a circuit drawing go: a line per site, the deepest on top, sublayers in lanes of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SWEEPS = 8
ACROSS = 4
"""Boxes that fit side by side."""
LANES = {"z": 0, "attn": 0, "embed": 1, "mlp_in": 1, "mlp": 1, "resid_mid": 2, "resid": 2}


@dataclass(frozen=True)
class Grid:
    """Lengths of the drawing, in inches."""

    width: float = 10.5
    left: float = 0.95
    right: float = 0.3
    box: float = 2.16
    height: float = 0.235
    top: float = 1.6
    bottom: float = 1.3

    @property
    def pitch(self) -> float:
        """Distance between the left edges of neighbouring boxes."""
        return (self.width - self.left - self.right + 0.16) / ACROSS


@dataclass(frozen=True)
class Line:
    """Boxes side by side, all of one site."""

    site: str
    nodes: tuple[str, ...]
    first: bool
    """Whether it is the lowest line of its site."""
    y: float


@dataclass(frozen=True)
class Layout:
    """Places in inches from the lower left corner, and the size of the drawing."""

    places: dict[str, tuple[float, float]]
    """Left edge and middle height of each node's box."""
    line_of: dict[str, int]
    lines: tuple[Line, ...]
    """From the bottom up."""
    metric: tuple[float, float]
    width: float
    height: float


def place(
    columns: Mapping[str, Sequence[str]], edges: Sequence[tuple[str, str, float]], grid: Grid | None = None
) -> tuple[Grid, Layout]:
    """Places of all nodes.

    :param columns: node names by site, sites in the order of depth.
    :param edges: (upstream node, downstream node, weight); ends that are no node are ignored.
    """
    grid = grid or Grid()
    rows = [row for site, nodes in columns.items() for row in _rows(site, nodes)]
    alone = len({lane_of(site) for site, nodes in columns.items() if nodes}) <= 1
    slots = _ordered(rows, edges, alone)
    line_of = {node: number for number, (_, nodes, _) in enumerate(rows) for node in nodes}
    heights = _heights(rows, line_of, edges, grid)
    places = {
        node: (grid.left + slots[node] * grid.pitch, heights[number]) for node, number in line_of.items()
    }
    lines = tuple(
        Line(site, tuple(sorted(nodes, key=slots.__getitem__)), first, y)
        for (site, nodes, first), y in zip(rows, heights, strict=True)
    )
    top = heights[-1] if heights else grid.bottom
    metric = (grid.left + (grid.width - grid.left - grid.right) / 2, top + 0.62)
    return grid, Layout(places, line_of, lines, metric, grid.width, top + grid.top)


def lane_of(site: str) -> int:
    """0: attention, 1: MLP and embedding, 2: residual stream."""
    return LANES.get(site.partition(".")[0], 2)


def _rows(site: str, nodes: Sequence[str]) -> list[tuple[str, list[str], bool]]:
    """A site's nodes in lines of about equal length."""
    count = -(-len(nodes) // ACROSS)
    parts = [[str(node) for node in part] for part in np.array_split(np.array(nodes, object), count or 1)]
    return [(site, part, number == 0) for number, part in enumerate(parts) if part]


def _heights(
    rows: Sequence[tuple[str, list[str], bool]],
    line_of: Mapping[str, int],
    edges: Sequence[tuple[str, str, float]],
    grid: Grid,
) -> list[float]:
    """Middle of each line; the more edges pass between two lines, the more room they get."""
    passing = np.zeros(len(rows) + 1)
    for up, down, _ in edges:
        if up in line_of and down in line_of:
            passing[line_of[up] + 1 : line_of[down] + 1] += 1
    heights, y = [], grid.bottom + grid.height / 2
    for number, (_, _, first) in enumerate(rows):
        if number:
            base = 0.17 if first else 0.1
            y += grid.height + base + min(0.3, 0.012 * float(passing[number]))
        heights.append(y)
    return heights


def _slots(site: str, count: int, alone: bool) -> list[float]:
    """Places of a line's boxes from left to right: a lane fills from its side, one alone from the middle."""
    lane = 1 if alone else lane_of(site)
    return [(ACROSS - count) * lane / 2 + number for number in range(count)]


def _ordered(
    rows: Sequence[tuple[str, list[str], bool]], edges: Sequence[tuple[str, str, float]], alone: bool
) -> dict[str, float]:
    """Order by the barycentre rule of layered drawings: each node goes to the weighted mean place of its neighbours."""
    order = [list(nodes) for _, nodes, _ in rows]
    slots = {
        node: slot
        for (site, nodes, _) in rows
        for node, slot in zip(nodes, _slots(site, len(nodes), alone), strict=True)
    }
    neighbours: dict[str, list[tuple[str, float]]] = {node: [] for node in slots}
    for up, down, weight in edges:
        if up in slots and down in slots:
            neighbours[up].append((down, abs(weight)))
            neighbours[down].append((up, abs(weight)))
    for sweep in range(SWEEPS):
        for number in range(len(rows)) if sweep % 2 == 0 else reversed(range(len(rows))):
            wanted = {node: _barycentre(node, neighbours[node], slots) for node in order[number]}
            order[number].sort(key=wanted.__getitem__)
            slots.update(zip(order[number], _slots(rows[number][0], len(order[number]), alone), strict=True))
    return slots


def _barycentre(node: str, neighbours: Sequence[tuple[str, float]], slots: Mapping[str, float]) -> float:
    total = sum(weight for _, weight in neighbours)
    if total == 0:
        return slots[node]
    return float(np.sum([slots[other] * weight for other, weight in neighbours]) / total)

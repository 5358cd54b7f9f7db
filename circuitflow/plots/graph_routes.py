"""Ways of edges in drawings with many rows: straight lines that bend only where a box is in the way."""

from collections.abc import Sequence

from circuitflow.plots.circuit_layout import Grid, Layout
from circuitflow.plots.circuit_routes import PAD, Point, Route, routes

CLEAR = PAD * 0.9
"""Inches between an edge and a box that it passes; ways along boxes stand a little further off."""
ROUND = 0.12
"""Inches before and after a bend within which it is rounded."""
MOVE, LINE, BEND = 1, 2, 3
"""Codes of matplotlib's paths: start, straight line, quadratic curve."""


def straight_routes(
    edges: Sequence[tuple[str, str]], grid: Grid, layout: Layout
) -> dict[tuple[str, str], Route]:
    """The way of each edge (up, down), as corners of straight lines.

    Edges first find their way between the boxes of every row; then corners that no box asks for are left out.
    """
    found = {}
    for edge, way in routes(edges, grid, layout).items():
        rows = range(layout.line_of[edge[0]] + 1, layout.line_of[edge[1]])
        found[edge] = _straightened(way, rows, grid, layout)
    return found


def _straightened(points: Sequence[Point], rows: Sequence[int], grid: Grid, layout: Layout) -> Route:
    """Corners such that every line between two of them passes beside the boxes of the rows in between.

    :param points: start, below and above each row, end; going on from each to the next is free.
    """
    kept, at = [points[0]], 0
    while at < len(points) - 1:
        ahead = len(points) - 1
        while ahead > at + 1 and not _is_free(points[at], points[ahead], rows, grid, layout):
            ahead -= 1
        kept.append(points[ahead])
        at = ahead
    return kept


def _is_free(start: Point, end: Point, rows: Sequence[int], grid: Grid, layout: Layout) -> bool:
    slope = (end[0] - start[0]) / (end[1] - start[1])
    for row in rows:
        line = layout.lines[row]
        low, high = max(start[1], line.y - grid.height / 2), min(end[1], line.y + grid.height / 2)
        if low >= high:
            continue
        ends = [start[0] + slope * (y - start[1]) for y in (low, high)]
        left, right = min(ends) - CLEAR, max(ends) + CLEAR
        for node in line.nodes:
            box = layout.places[node][0]
            if box < right and left < box + grid.box:
                return False
    return True


def rounded_curve(route: Sequence[Point]) -> tuple[list[Point], list[int]]:
    """Vertices and codes of a matplotlib path along straight lines whose corners are rounded."""
    vertices, codes = [route[0]], [MOVE]
    for before, corner, after in zip(route, route[1:], route[2:], strict=False):
        vertices += [_towards(corner, before), corner, _towards(corner, after)]
        codes += [LINE, BEND, BEND]
    return [*vertices, route[-1]], [*codes, LINE]


def _towards(corner: Point, other: Point) -> Point:
    """The point at which rounding begins: a short way from the corner, never beyond the middle."""
    length = ((other[0] - corner[0]) ** 2 + (other[1] - corner[1]) ** 2) ** 0.5
    share = min(0.5, ROUND / length) if length else 0.0
    return corner[0] + share * (other[0] - corner[0]), corner[1] + share * (other[1] - corner[1])

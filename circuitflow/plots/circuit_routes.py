"""Ways of edges between the lines of a circuit drawing: they pass beside boxes, never behind them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from circuitflow.circuits.circuit import METRIC
from circuitflow.plots.circuit_layout import Grid, Layout

Point = tuple[float, float]
Route = list[Point]
"""Points at which a curve stands upright; between two of them it is one S."""

PAD, STEP = 0.035, 0.022


def routes(edges: Sequence[tuple[str, str]], grid: Grid, layout: Layout) -> dict[tuple[str, str], Route]:
    """The way of each edge (up, down), from the top of one box to the bottom of another; down may be the metric."""
    starts = _ports(edges, layout, grid, out=True)
    ends = _ports(edges, layout, grid, out=False)
    used: dict[tuple[int, int], int] = {}
    return {edge: _route(edge, starts[edge], ends[edge], grid, layout, used) for edge in edges}


def _ports(
    edges: Iterable[tuple[str, str]], layout: Layout, grid: Grid, out: bool
) -> dict[tuple[str, str], Point]:
    """Where edges leave boxes (``out``) or enter them: side by side, in the order of their other ends."""
    at: dict[str, list[tuple[str, str]]] = {}
    for edge in edges:
        at.setdefault(edge[0] if out else edge[1], []).append(edge)
    found = {}
    for node, own in at.items():
        own.sort(key=lambda edge: (_middle(edge[1] if out else edge[0], layout, grid), edge))
        x, y, width = _frame(node, layout, grid, out)
        for number, edge in enumerate(own):
            found[edge] = (x + width * (number + 1) / (len(own) + 1), y)
    return found


def _frame(node: str, layout: Layout, grid: Grid, out: bool) -> tuple[float, float, float]:
    if node == METRIC:
        return layout.metric[0] - 0.1, layout.metric[1] - 0.1, 0.2
    x, y = layout.places[node]
    return x + 0.1, y + (grid.height / 2 if out else -grid.height / 2), grid.box - 0.2


def _middle(node: str, layout: Layout, grid: Grid) -> float:
    return layout.metric[0] if node == METRIC else layout.places[node][0] + grid.box / 2


def _route(
    edge: tuple[str, str],
    start: Point,
    end: Point,
    grid: Grid,
    layout: Layout,
    used: dict[tuple[int, int], int],
) -> Route:
    low = layout.line_of[edge[0]]
    high = len(layout.lines) if edge[1] == METRIC else layout.line_of[edge[1]]
    points, x = [start], start[0]
    for number in range(low + 1, high):
        y = layout.lines[number].y
        wanted = x + (end[0] - x) * (y - points[-1][1]) / max(end[1] - points[-1][1], 1e-9)
        x = _free(number, wanted, grid, layout, used)
        points += [(x, y - grid.height / 2), (x, y + grid.height / 2)]
    return [*points, end]


def _free(number: int, wanted: float, grid: Grid, layout: Layout, used: dict[tuple[int, int], int]) -> float:
    """The place nearest to ``wanted`` at which a line has no box; those who are pushed aside stand side by side."""
    gaps = _gaps(number, grid, layout)
    nearest = min(range(len(gaps)), key=lambda i: max(gaps[i][0] - wanted, wanted - gaps[i][1], 0.0))
    low, high = gaps[nearest]
    if low < wanted < high:
        return wanted
    steps = max(1, int((high - low) / STEP))
    turn = used[number, nearest] = used.get((number, nearest), -1) + 1
    offset = (turn % steps) * STEP
    return low + offset if wanted <= low else high - offset


def _gaps(number: int, grid: Grid, layout: Layout) -> list[tuple[float, float]]:
    found, x = [], grid.left - 0.12
    for node in layout.lines[number].nodes:
        left = layout.places[node][0]
        if left - PAD > x:
            found.append((x, left - PAD))
        x = left + grid.box + PAD
    return [*found, (x, max(x, layout.width - 0.06))]


def curve(route: Sequence[Point]) -> tuple[list[Point], list[int]]:
    """Vertices and codes of a matplotlib path along a route."""
    vertices, codes = [route[0]], [1]
    for (x0, y0), (x1, y1) in pairwise(route):
        if x0 == x1:
            vertices.append((x1, y1))
            codes.append(2)
            continue
        bend = (y1 - y0) * 0.55
        vertices += [(x0, y0 + bend), (x1, y1 - bend), (x1, y1)]
        codes += [4, 4, 4]
    return vertices, codes


def bands(layout: Layout, grid: Grid, layer_of: Mapping[str, str]) -> list[tuple[str, float, float]]:
    """(layer, bottom, top) of the lines of each layer, from the bottom up; neighbours meet halfway."""
    found: list[tuple[str, float, float]] = []
    for line in layout.lines:
        layer, low, high = layer_of[line.site], line.y - grid.height / 2, line.y + grid.height / 2
        if found and found[-1][0] == layer:
            found[-1] = (layer, found[-1][1], high)
            continue
        if found:
            middle = (found[-1][2] + low) / 2
            found[-1] = (found[-1][0], found[-1][1], middle)
            low = middle
        else:
            low -= 0.1
        found.append((layer, low, high))
    if found:
        found[-1] = (found[-1][0], found[-1][1], found[-1][2] + 0.1)
    return found

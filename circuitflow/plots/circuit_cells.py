"""Where nodes go in the position-aligned drawing: a column per token, as wide as it is full, a band per site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from circuitflow.circuits.circuit import Circuit
from circuitflow.plots.circuit_layout import Grid, Layout, Line

WIDTH, LEFT, RIGHT = 11.6, 0.95, 0.2
TOP, BOTTOM = 1.15, 1.8
BOX, HEIGHT, PITCH = 1.0, 0.34, 0.45
GAP = 0.1
"""Between boxes side by side: edges pass there."""
EMPTY = 0.75
"""Width of a column without nodes: its token must be readable."""

Places = Mapping[str, Mapping[int, float]]
"""By node: positions at which it stands, with its scores there."""


@dataclass(frozen=True)
class Cells:
    """Columns, bands and boxes, in inches."""

    columns: dict[int, tuple[float, float]]
    """Left edge and width by position."""
    bands: dict[str, tuple[float, float]]
    """Bottom and top by site."""
    grid: Grid
    layout: Layout
    """Its nodes are named by :func:`key`."""


def key(node: str, position: int) -> str:
    """Name of a node's box at one position."""
    return f"{node} at {position}"


def arrange(circuit: Circuit, places: Places, tokens: int) -> Cells:
    """Put every node at each of its positions.

    :param tokens: length of the example; the columns of longer ones are those with nodes, and the last.
    """
    used = {at for found in places.values() for at in found}
    shown = sorted(used | {tokens - 1} | (set(range(tokens)) if tokens <= 9 else set()))
    cells = {
        site: {at: [n.id for n in circuit.at(site) if at in places.get(n.id, {})] for at in shown}
        for site in circuit.sites
    }
    side = _side_by_side(cells, shown)
    columns, x = {}, LEFT
    for at in shown:
        width = side[at] * (BOX + GAP) + GAP if side[at] else EMPTY
        columns[at] = (x, width)
        x += width
    bands, lines, y = {}, [], BOTTOM
    found: dict[str, tuple[float, float]] = {}
    for site, row in cells.items():
        levels = max((-(-len(nodes) // side[at]) for at, nodes in row.items() if nodes), default=0)
        for level in range(levels):
            middle = y + 0.06 + PITCH * (level + 0.5)
            here = {}
            for at, nodes in row.items():
                for place, node in enumerate(nodes[level * side[at] : (level + 1) * side[at]]):
                    here[key(node, at)] = (columns[at][0] + GAP + place * (BOX + GAP), middle)
            found |= here
            lines.append(Line(site, tuple(sorted(here, key=lambda name: here[name][0])), level == 0, middle))
        if levels:
            bands[site] = (y, y + levels * PITCH + 0.12)
            y = bands[site][1]
    width = max(WIDTH, x + RIGHT)
    grid = Grid(width=width, left=LEFT, right=RIGHT, box=BOX, height=HEIGHT)
    left, last = columns[shown[-1]]
    line_of = {name: number for number, line in enumerate(lines) for name in line.nodes}
    layout = Layout(found, line_of, tuple(lines), (left + last / 2, y + 0.5), width, y + TOP)
    return Cells(columns, bands, grid, layout)


def _side_by_side(cells: Mapping[str, Mapping[int, Sequence[str]]], shown: Sequence[int]) -> dict[int, int]:
    """How many boxes stand side by side at each position: what room is left goes where it saves most height."""
    side = {at: int(any(row[at] for row in cells.values())) for at in shown}

    def height(at: int, count: int) -> int:
        return sum(-(-len(row[at]) // count) for row in cells.values())

    def width() -> float:
        return sum(count * (BOX + GAP) + GAP if count else EMPTY for count in side.values())

    while width() + BOX + GAP <= WIDTH - LEFT - RIGHT:
        saved = {at: height(at, count) - height(at, count + 1) for at, count in side.items() if count}
        best = max(saved, key=lambda at: (saved[at], at), default=None)
        if best is None or not saved[best]:
            break
        side[best] += 1
    return side

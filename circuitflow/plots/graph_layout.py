"""Where nodes of an attribution graph go: columns are positions, rows are layers, tokens below and logits on top."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from circuitflow.plots.circuit_layout import Grid, Layout, Line

WIDTH, LEFT, RIGHT = 11.6, 0.8, 0.2
TOP, BOTTOM = 0.62, 1.12
BOX, HEIGHT, PITCH = 1.12, 0.32, 0.385
GAP = 0.1
"""Between boxes side by side: edges pass there."""
EMPTY = 0.72
"""Width of a column without nodes: its token must be readable."""
LOGITS_ABREAST = 5
PAD = 0.1
"""Between the boxes of a row and its border, together."""
TOKENS, LOGITS = "tokens", "logits"

Cell = Mapping[int, Sequence[str]]
"""Names of the nodes of one row, by position."""


@dataclass(frozen=True)
class Place:
    """Columns, rows and boxes, in inches."""

    columns: dict[int, tuple[float, float]]
    """Left edge and width by position."""
    bands: dict[str, tuple[float, float]]
    """Bottom and top by row, from the bottom up."""
    grid: Grid
    layout: Layout


def arrange(layers: Mapping[int, Cell], tokens: Mapping[int, str], logits: Sequence[str]) -> Place:
    """Put nodes into the cells of their layers and positions; layers without nodes take no room.

    :param layers: nodes by layer, from the lowest on, and by position.
    :param tokens: name of the node of each token, by position.
    :param logits: names of the logits, the most probable first; they stand above the last position.
    """
    rows = {f"layer {layer}": cell for layer, cell in layers.items()}
    side = _side_by_side(list(rows.values()), list(tokens))
    columns, x = {}, LEFT
    for at in tokens:
        width = side[at] * (BOX + GAP) + GAP if side[at] else EMPTY
        columns[at] = (x, width)
        x += width
    width = max(WIDTH, x + RIGHT, LEFT + len(logits[:LOGITS_ABREAST]) * (BOX + GAP) + RIGHT)
    lines: list[Line] = []
    bands: dict[str, tuple[float, float]] = {}
    found: dict[str, tuple[float, float]] = {}
    y = BOTTOM
    for name, cell in {TOKENS: {at: [node] for at, node in tokens.items()}, **rows}.items():
        levels = _levels(cell, side if name != TOKENS else dict.fromkeys(tokens, 1), columns)
        for number, here in enumerate(levels):
            middle = y + PAD / 2 + PITCH * (number + 0.5)
            found |= {node: (left, middle) for node, left in here.items()}
            lines.append(Line(name, tuple(sorted(here, key=here.__getitem__)), number == 0, middle))
        if levels:
            bands[name] = (y, y + len(levels) * PITCH + PAD)
            y = bands[name][1]
    y = _logits(logits, columns[max(columns)], y, found, lines, bands)
    line_of = {node: number for number, line in enumerate(lines) for node in line.nodes}
    grid = Grid(width=width, left=LEFT, right=RIGHT, box=BOX, height=HEIGHT)
    layout = Layout(found, line_of, tuple(lines), (0.0, 0.0), width, y + TOP)
    return Place(columns, bands, grid, layout)


def _logits(
    logits: Sequence[str],
    column: tuple[float, float],
    y: float,
    found: dict[str, tuple[float, float]],
    lines: list[Line],
    bands: dict[str, tuple[float, float]],
) -> float:
    """Rows of logits above a column, the most probable at the right end of the upper one; gives where they end.

    Rows that are wider than the column end where it ends, unless they would leave the drawing at the left.
    """
    fitting = int((column[1] - GAP) // (BOX + GAP))
    room = max(LOGITS_ABREAST, fitting)
    wide = min(len(logits), room) * (BOX + GAP) + GAP
    end = max(column[0] + column[1] - max(column[1] - wide, 0) / 2, LEFT + wide)
    parts = [logits[start : start + room] for start in range(0, len(logits), room)]
    start = y
    for number, part in enumerate(reversed(parts)):
        middle = y + PAD / 2 + PITCH / 2
        first = end - len(part) * (BOX + GAP)
        for place, node in enumerate(reversed(part)):
            found[node] = (first + place * (BOX + GAP), middle)
        lines.append(Line(LOGITS, tuple(reversed(part)), number == 0, middle))
        y += PITCH + (PAD if number == len(parts) - 1 else 0)
    if parts:
        bands[LOGITS] = (start, y)
    return y


def _levels(
    cell: Cell, side: Mapping[int, int], columns: Mapping[int, tuple[float, float]]
) -> list[dict[str, float]]:
    """Left edges of a row's boxes, level by level from the bottom; those of narrow columns stand in their middle."""
    count = max((-(-len(nodes) // max(side[at], 1)) for at, nodes in cell.items()), default=0)
    levels: list[dict[str, float]] = [{} for _ in range(count)]
    for at, nodes in cell.items():
        left, width = columns[at]
        for number, node in enumerate(nodes):
            level, place = divmod(number, max(side[at], 1))
            beside = min(len(nodes) - level * max(side[at], 1), max(side[at], 1))
            margin = (width - beside * (BOX + GAP) + GAP) / 2
            levels[level][node] = left + margin + place * (BOX + GAP)
    return levels


def _side_by_side(rows: Sequence[Cell], positions: Sequence[int]) -> dict[int, int]:
    """How many boxes stand side by side at each position: what room is left goes where it saves most height."""
    side = {at: int(any(row.get(at) for row in rows)) for at in positions}

    def height(given: Mapping[int, int]) -> int:
        return sum(
            max((-(-len(nodes) // max(given[at], 1)) for at, nodes in row.items()), default=0) for row in rows
        )

    def width() -> float:
        return sum(count * (BOX + GAP) + GAP if count else EMPTY for count in side.values())

    while width() + BOX + GAP <= WIDTH - LEFT - RIGHT:
        crowded = {at: sum(len(row.get(at, ())) > side[at] for row in rows) for at in positions if side[at]}
        saved = {at: (height(side) - height({**side, at: side[at] + 1}), crowded[at]) for at in crowded}
        best = max(saved, key=lambda at: (*saved[at], at), default=None)
        if best is None or not saved[best][1]:
            break
        side[best] += 1
    return side

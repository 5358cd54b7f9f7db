"""A live terminal view: the running jobs, from the progress files that they keep beside their logs, and the curves of
the running trainings, from theirs.
"""

import json
import math
import socket
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from circuitflow.progress import clock

REFRESH_SECONDS = 0.5
BARS = "▁▂▃▄▅▆▇█"
NOTHING = "No job is running here; start some with `snakemake --cores 8`, or give the folder of their logs with --logs."
PANEL_LINES = 6  # of one training: a frame and a line for each of its curves
TABLE_LINES = 4  # title, header and rule of the table of jobs, and the line of the cursor
FEW = 3  # jobs that a panel may not push out

CURVES = (
    ("held-out FVU", "held_out.fvu", True),
    ("held-out L0", "held_out.l0", False),
    ("dead share", "dead", False),
    ("learning rate", "lr", False),
)
"""Name, key of the log, and whether it is drawn on a logarithmic scale."""

State = dict[str, Any]
"""What a job says of itself: :func:`circuitflow.progress.progress`."""


def watch_jobs(logs: Path, console: Console | None = None) -> None:
    """Show running jobs until interrupted."""
    with Live(View(logs), console=console, refresh_per_second=4) as live:
        try:
            while True:
                time.sleep(REFRESH_SECONDS)
                live.update(View(logs))
        except KeyboardInterrupt:
            return


class View:
    """Jobs and curves as they are when drawn, cut to the height of the terminal."""

    def __init__(self, logs: Path) -> None:
        self._states = running_jobs(logs)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table of jobs, then a panel for every training for which there is room."""
        room = (options.height or console.size.height) - TABLE_LINES
        trainings = [state for state in self._states if state.get("curves")]
        panels = trainings and room - min(FEW, len(self._states)) >= PANEL_LINES
        shown = self._states[: max(1, room - PANEL_LINES if panels else room)]
        yield jobs_table(shown, len(self._states))
        for state in trainings[: max(0, room - len(shown)) // PANEL_LINES]:
            yield curves_panel(state, read_lines(Path(state["curves"])), options.max_width)


def running_jobs(logs: Path) -> list[State]:
    """States of the jobs that are alive (on this host; jobs of other hosts are taken at their word)."""
    states = []
    for file in sorted(logs.rglob("*.progress.json")):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if state["host"] != socket.gethostname() or psutil.pid_exists(state["pid"]):
            states.append(state)
    return states


def jobs_table(states: Sequence[State], total: int) -> Table:
    """One row a job: what it does, how far it is, what it measures, how long it has run and will run.

    :param total: jobs that run; if more than ``states``, the title says so.
    """
    hidden = f", {total - len(states)} more not shown" if total > len(states) else ""
    title = f"circuitflow: {total} running job{'s' * (total != 1)}{hidden}"
    table = Table(
        title=title, expand=True, box=SIMPLE_HEAD, show_edge=False, padding=0, collapse_padding=True
    )
    table.add_column("job", no_wrap=True, overflow="ellipsis")
    table.add_column("doing", no_wrap=True, min_width=5)
    table.add_column("", width=8, min_width=8)
    table.add_column("share", justify="right", no_wrap=True, min_width=5)
    table.add_column("now", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("elapsed", justify="right", no_wrap=True, min_width=10)
    table.add_column("left", justify="right", no_wrap=True, min_width=10)
    for state in states:
        whole = max(state["total"], 1)
        facts = ", ".join(f"{name} {value}" for name, value in state["facts"].items())
        left = "" if state["remaining"] is None else clock(state["remaining"])
        bar = ProgressBar(total=whole, completed=state["done"], width=8)
        share = f"{100 * state['done'] / whole:.0f} %"
        table.add_row(state["job"], state["what"], bar, share, facts, clock(state["elapsed"]), left)
    if not states:
        table = Table(title="circuitflow: no running job", show_header=False, expand=True)
        table.add_row(NOTHING)
    return table


def curves_panel(state: State, lines: Sequence[Mapping[str, Any]], width: int) -> Panel:
    """The curves of one training, from the first to the last line of its log, in ``width`` columns."""
    body = Text(no_wrap=True, overflow="crop")
    last = lines[-1]["step"] if lines else 0
    for number, (name, key, logarithmic) in enumerate(CURVES):
        points = [(line["step"], value) for line in lines if (value := _value(line, key)) is not None]
        body.append("\n" * bool(number) + f"{name:<14}", style="dim")
        if not points:
            body.append("nothing measured yet", style="dim")
            continue
        newest = _short(points[-1][1])
        body.append(f"{newest:>9}  ", style="bold")
        body.append(sparkline(points, last, max(8, width - 56), logarithmic), style="cyan")
        body.append(f"  {_short(points[0][1])} → {newest}" + (", log" if logarithmic else ""), style="dim")
    title = f"{state['job']}: {state['what']} {state['done']} of {state['total']}"
    return Panel(body, title=title, title_align="left", padding=(0, 1))


def sparkline(points: Sequence[tuple[int, float]], last: int, width: int, logarithmic: bool = False) -> str:
    """Values by step as bars from the smallest to the largest, over steps 1 to ``last``.

    A bar is the mean of its steps' values; where there is none it is that of the bar before, or at the start after it.
    """
    columns: list[list[float]] = [[] for _ in range(width)]
    positive = all(value > 0 for _, value in points)
    for step, value in points:
        if math.isfinite(value):
            height = math.log(value) if logarithmic and positive else value
            columns[min((step - 1) * width // last, width - 1)].append(height)
    means = [sum(column) / len(column) for column in columns if column]
    if not means:
        return " " * width
    low, extent = min(means), max(means) - min(means)
    bars, bar = [], _bar(means[0], low, extent)
    for column in columns:
        bar = _bar(sum(column) / len(column), low, extent) if column else bar
        bars.append(bar)
    return "".join(bars)


def _bar(value: float, low: float, extent: float) -> str:
    return BARS[min(int((value - low) / extent * len(BARS)), len(BARS) - 1)] if extent > 0 else BARS[0]


def read_lines(log: Path) -> list[dict[str, Any]]:
    """The lines of a log that is being written; a half line at its end is left for the next time."""
    try:
        return _read_lines(log, log.stat().st_size)
    except OSError:
        return []


@lru_cache(maxsize=64)
def _read_lines(log: Path, size: int) -> list[dict[str, Any]]:
    lines = []
    for text in log.read_bytes()[:size].splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _value(line: Mapping[str, Any], key: str) -> float | None:
    value: Any = line
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _short(value: float) -> str:
    return f"{value:.4g}"

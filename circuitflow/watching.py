"""A live terminal view of the running jobs, from the progress files that they keep beside their logs."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from circuitflow.progress import clock

REFRESH_SECONDS = 0.5


def watch_jobs(logs: Path, console: Console | None = None) -> None:
    """Show running jobs until interrupted."""
    with Live(jobs_table(logs), console=console, refresh_per_second=4) as live:
        try:
            while True:
                time.sleep(REFRESH_SECONDS)
                live.update(jobs_table(logs))
        except KeyboardInterrupt:
            return


def running_jobs(logs: Path) -> list[dict[str, Any]]:
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


def jobs_table(logs: Path) -> Table:
    """One row a job: what it does, how far it is, what it measures, how long it has run and will run."""
    table = Table("job", "doing", "", "share", "now", "elapsed", "left", title="circuitflow: running jobs")
    for state in running_jobs(logs):
        total = max(state["total"], 1)
        facts = ", ".join(f"{name} {value}" for name, value in state["facts"].items())
        left = "" if state["remaining"] is None else clock(state["remaining"])
        bar = ProgressBar(total=total, completed=state["done"], width=24)
        share = f"{100 * state['done'] / total:.0f} %"
        table.add_row(state["job"], state["what"], bar, share, facts, clock(state["elapsed"]), left)
    if not table.rows:
        table.add_row("(none)", "", "", "", "", "", "")
    return table

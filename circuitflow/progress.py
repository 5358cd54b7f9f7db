"""What a running job is doing: one line now and then for people, one small file for ``circuitflow watch``."""

import json
import logging
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINE_EVERY_SECONDS = 5.0
FILE_EVERY_SECONDS = 0.5

logger = logging.getLogger("circuitflow")


@dataclass
class _Board:
    """Where the current job shows its progress; set by the job that runs in this process."""

    job: str = ""
    file: Path | None = None
    started: float = field(default_factory=time.monotonic)
    last_line: float = 0.0
    last_file: float = 0.0
    curves: Path | None = None
    first_done: dict[str, tuple[int, float]] = field(default_factory=dict)


_board = _Board()


def announce(job: str, file: Path | None) -> None:
    """Start the board of this process's job; ``file`` is rewritten as the job goes on."""
    vars(_board).update(vars(_Board(job=job, file=file)))


def show_curves(log: Path) -> None:
    """Let ``circuitflow watch`` draw the numbers of a training's ``log`` (JSON lines) beside this job's progress."""
    _board.curves = log.absolute()


def finish() -> None:
    """Take the job's progress file away: the job has ended."""
    if _board.file is not None:
        _board.file.unlink(missing_ok=True)


def progress(what: str, done: int, total: int, **facts: Any) -> None:
    """Report ``done`` of ``total`` units of ``what``; throttled, so callers may call it at every step.

    The remaining time is extrapolated from the pace since the first report of ``what`` in this process, so that
    work kept from an interrupted run does not make it look faster than it is.
    """
    now = time.monotonic()
    start_done, start_time = _board.first_done.setdefault(what, (done, now))
    pace = (now - start_time) / (done - start_done) if done > start_done else None
    remaining = None if pace is None else pace * (total - done)
    finished = done >= total
    if finished or now - _board.last_line >= LINE_EVERY_SECONDS:
        _board.last_line = now
        logger.info(_line(what, done, total, now - _board.started, remaining, facts))
    if _board.file is not None and (finished or now - _board.last_file >= FILE_EVERY_SECONDS):
        _board.last_file = now
        _write(_board.file, what, done, total, now - _board.started, remaining, facts)


def _line(
    what: str, done: int, total: int, elapsed: float, remaining: float | None, facts: dict[str, Any]
) -> str:
    share = 100 * done / total if total else 100.0
    shown = "".join(f", {name} {_short(value)}" for name, value in facts.items())
    left = "" if remaining is None or done >= total else f", about {clock(remaining)} left"
    return f"{_board.job}: {what} {done}/{total} ({share:.0f} %){shown}, {clock(elapsed)} elapsed{left}"


def clock(seconds: float) -> str:
    """Seconds as people read them: "42 s", "3 min 5 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(
    file: Path,
    what: str,
    done: int,
    total: int,
    elapsed: float,
    remaining: float | None,
    facts: dict[str, Any],
) -> None:
    state = {
        "job": _board.job,
        "what": what,
        "done": done,
        "total": total,
        "elapsed": elapsed,
        "remaining": remaining,
        "facts": {name: _short(value) for name, value in facts.items()},
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "curves": None if _board.curves is None else str(_board.curves),
    }
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        logger.debug("progress file %s cannot be written", file, exc_info=True)

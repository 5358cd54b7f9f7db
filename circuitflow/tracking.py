"""Followers of a training's log: its lines also go to where people watch their runs (Weights & Biases).

The log itself, ``log.jsonl``, is always written. A follower can lose nothing but its own view: whatever goes wrong
there is one warning, and the training goes on. An interrupted and resumed job continues the same W&B run. How far a
run has been followed is kept beside its files, so that no step is logged twice though a killed training repeats the
steps since its last state; lines that a follower has not seen yet it is given when it starts.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from circuitflow.progress import logger

Line = Mapping[str, Any]
"""One line of a log: numbers by name, among them ``step``; a nested mapping is a group of numbers."""

CONNECT_SECONDS = 20.0
UPLOAD_SECONDS = (
    120.0  # at the end of an online run: a training that is done must not wait for a dead network
)
FLUSH_SECONDS = 1.0  # what a kill can cost the view

QUIET: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "disable_job_creation": True,
    "save_code": False,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "init_timeout": CONNECT_SECONDS,
    "finish_timeout": UPLOAD_SECONDS,
    "x_transaction_log_flush_interval": FLUSH_SECONDS,
}
"""Settings of W&B: numbers of the log and nothing of the machine, the repository or the screen."""


@dataclass(frozen=True)
class Run:
    """What followers are told of a training."""

    id: str
    """Of the recipe: a resumed job has the same, other settings have another."""
    site: str
    settings: Mapping[str, Any]


class Sink(Protocol):
    """Where lines go."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one step; steps ascend."""
        ...

    def close(self, failed: bool) -> None:
        """No more lines come: the run has ended, or will be resumed."""
        ...


def tracking_of(job: Any) -> dict[str, Any] | None:
    """What a workflow's configuration says of tracking, for the stage that ``job`` (Snakemake's script object) runs.

    Adds ``folder``, beside the job's log, and ``name``, that of its output below ``results``. It shapes no result, so
    it belongs among a stage's checks, not its params.
    """
    chosen = {kind: values for kind, values in (job.config.get("tracking") or {}).items() if values}
    if not chosen:
        return None
    output = Path(next(iter(job.output)))
    below = output.parts[output.parts.index("results") + 1 : -1]
    folder = Path(job.log[0]).with_suffix(".tracking")
    return {**chosen, "folder": str(folder), "name": "/".join((*below, output.stem))}


@contextmanager
def follow(
    tracking: Mapping[str, Any] | None, run: Run, lines: Sequence[Line]
) -> Iterator[Callable[[Line], None]]:
    """A function that takes the lines of a log as they are written.

    :param tracking: ``wandb`` (project, and if wanted entity, mode, group), ``folder``, ``name``; None follows nothing.
    :param lines: those that the log already has.
    """
    chosen = tracking or {}
    followers = [_Follower(kind, chosen, run) for kind in SINKS if chosen.get(kind)]

    def write(line: Line) -> None:
        for follower in followers:
            follower.write(line)

    failed = True
    try:
        for line in lines:
            write(line)
        yield write
        failed = False
    finally:
        for follower in followers:
            follower.close(failed)


class _Follower:
    """One sink, how far it has come, and what it does when it breaks: a warning, then silence."""

    def __init__(self, kind: str, tracking: Mapping[str, Any], run: Run) -> None:
        self._kind, self._last = kind, 0
        self._sink: Sink | None = None
        folder = Path(tracking["folder"])
        self._cursor = folder / f"{kind}-{run.id}.json"
        with self._guarded():
            folder.mkdir(parents=True, exist_ok=True)
            self._last = self._read_cursor()
            self._sink = SINKS[kind](tracking, run)

    def write(self, line: Line) -> None:
        if self._sink is None or line["step"] <= self._last:
            return
        with self._guarded():
            self._last = line["step"]
            self._write_cursor()  # first: a kill between the two may lose a step of the view, never double it
            self._sink.write(line["step"], _flat(line))

    def close(self, failed: bool) -> None:
        if self._sink is not None:
            with self._guarded():
                self._sink.close(failed)
        self._sink = None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a library that may raise anything
            self._sink = None
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning(
                "tracking.%s: %s; the training goes on without it (log.jsonl has every line)",
                self._kind,
                reason,
            )

    def _read_cursor(self) -> int:
        try:
            return int(json.loads(self._cursor.read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError):
            return 0

    def _write_cursor(self) -> None:
        temporary = self._cursor.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": self._last}), encoding="utf-8")
        os.replace(temporary, self._cursor)


class _Wandb:
    """A run of Weights & Biases."""

    def __init__(self, tracking: Mapping[str, Any], run: Run) -> None:
        try:
            import wandb
        except ImportError:
            raise RuntimeError(
                "the package wandb is not installed (pip install 'circuitflow[tracking]')"
            ) from None
        chosen = tracking["wandb"]
        known = {key: value for key, value in QUIET.items() if key in wandb.Settings.model_fields}
        settings = wandb.Settings(**known)
        wandb.setup(settings)
        arguments = {
            "project": chosen["project"],
            "entity": chosen.get("entity"),
            "group": chosen.get("group"),
            "id": run.id,
            "name": tracking.get("name", run.site),
            "config": {"site": run.site, **run.settings},
            "dir": tracking["folder"],
            "resume": "allow",
            "settings": settings,
        }
        if chosen.get("mode", "offline") == "online":
            try:
                wandb.login(prompt=False, verify=False)
                self._run = wandb.init(mode="online", **arguments)
                return
            except Exception as error:
                wandb.teardown()  # what has half begun holds the run's id
                reason = " ".join(str(error).split())
                logger.warning("tracking.wandb: no connection (%s), so the run is kept offline", reason)
        self._run = wandb.init(mode="offline", **arguments)
        logger.info(
            "tracking.wandb: run %s is kept in %s/wandb; `wandb sync` uploads it", run.id, tracking["folder"]
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


SINKS: dict[str, Callable[[Mapping[str, Any], Run], Sink]] = {"wandb": _Wandb}
"""What a configuration can name under ``tracking``."""


def _flat(line: Line) -> dict[str, float]:
    """Numbers by name; those of a group as group/name, an absent group left out."""
    values: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            values |= {f"{name}/{inner}": number for inner, number in _flat(value).items()}
        elif value is not None and name != "step":
            values[name] = value
    return values

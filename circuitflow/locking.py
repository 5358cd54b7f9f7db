"""Whose lock it is: Snakemake's own lock names no owner, so a killed run would block the next one for ever."""

import json
import os
import socket
from pathlib import Path

import psutil

from circuitflow.errors import UserError

OWNER = "circuitflow-owner.json"


def record_owner(state: Path) -> None:
    """Write down which process runs the workflow; ``state`` is the folder ``.snakemake``."""
    process = psutil.Process()
    owner = {"pid": process.pid, "created": process.create_time(), "host": socket.gethostname()}
    state.mkdir(exist_ok=True)
    (state / OWNER).write_text(json.dumps(owner), encoding="utf-8")


def unlock_stale(folder: Path) -> bool:
    """Remove the lock of a run in ``folder`` whose process is dead; True if there was one.

    :raises UserError: the owner is alive, or ran on another host and cannot be seen from here.
    """
    state = folder / ".snakemake"
    if not any((state / "locks").glob("*")):
        return False
    owner = _owner(state)
    if owner is not None and owner["host"] != socket.gethostname():
        raise UserError(
            f"The folder is locked by a run on {owner['host']} (process {owner['pid']}); if that run is dead, use "
            "`snakemake --unlock`."
        )
    alive = _alive(owner) if owner is not None else _running_here(folder)
    if alive:
        raise UserError(f"A run is under way in this folder (process {alive}); wait for it or end it first.")
    for lock in (state / "locks").glob("*"):
        lock.unlink(missing_ok=True)
    return True


def _owner(state: Path) -> dict | None:
    try:
        owner = json.loads((state / OWNER).read_text(encoding="utf-8"))
        return owner if {"pid", "created", "host"} <= owner.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _alive(owner: dict) -> int | None:
    """The owner's process id while it lives; a later process with the same number was created at another time."""
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process.pid if same else None


def _running_here(folder: Path) -> int | None:
    """A live Snakemake whose working directory is ``folder``: for runs killed before they wrote their owner."""
    for process in psutil.process_iter(["cmdline", "cwd", "pid"]):
        command = " ".join(process.info["cmdline"] or [])
        if (
            "snakemake" in command
            and process.info["cwd"] == str(folder.resolve())
            and process.pid != os.getpid()
        ):
            return int(process.info["pid"])
    return None

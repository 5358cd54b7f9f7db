"""What an interrupted training leaves behind: one state file, a log cut to match it, and a clean end on SIGTERM."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from circuitflow.dictionaries.describing import LOG_FILE
from circuitflow.dictionaries.tensors import read_tensors, write_tensors
from circuitflow.errors import UserError
from circuitflow.progress import logger
from circuitflow.provenance import canonical_json

STATE_FILE = "state.safetensors"
INTERVAL_VARIABLE = "CIRCUITFLOW_CHECKPOINT_SECONDS"
DEFAULT_INTERVAL = 60.0


class TrainingLog:
    """``log.jsonl``, one JSON object a line with fixed keys and no times, so that equal runs give equal bytes."""

    def __init__(self, path: Path, length: int = 0) -> None:
        """Open the log at a length in bytes; lines after it were written after the state that is resumed."""
        path.touch()
        os.truncate(path, length)
        self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line, whole, for those who watch."""
        self._file.write((canonical_json(dict(line)) + "\n").encode())
        self._file.flush()

    def sync(self) -> int:
        """Bring the log to the disk and return its length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.sync()
        self._file.close()


def save_state(folder: Path, tensors: Mapping[str, Tensor], done: int, log: TrainingLog, recipe: str) -> None:
    """Write the state after ``done`` steps, log first, so that the state never knows more lines than the log has."""
    facts = {"done": done, "log_bytes": log.sync(), "recipe": recipe}
    write_tensors(folder / STATE_FILE, tensors, facts)


def load_state(folder: Path, recipe: str) -> tuple[dict[str, Tensor], int, int] | None:
    """Tensors, steps done and length of the log; None if there is no state of this recipe that can be used."""
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        tensors, facts = read_tensors(path)
    except UserError:
        logger.warning("%s is damaged: training starts again", path)
        return None
    if facts is None or facts["recipe"] != recipe:
        logger.warning("%s belongs to other settings: training starts again", path)
        return None
    log = folder / LOG_FILE
    if not log.is_file() or log.stat().st_size < facts["log_bytes"]:
        logger.warning("%s is shorter than the state says: training starts again", log)
        return None
    return tensors, facts["done"], facts["log_bytes"]


class Interval:
    """Tells when the next state is due: every CIRCUITFLOW_CHECKPOINT_SECONDS (60), which shapes no result."""

    def __init__(self) -> None:
        text = os.environ.get(INTERVAL_VARIABLE, str(DEFAULT_INTERVAL))
        try:
            self._seconds = float(text)
        except ValueError:
            raise UserError(
                f"Environment variable {INTERVAL_VARIABLE} is {text!r}, not a number; set it to seconds, e.g. 60."
            ) from None
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the interval has passed since this last said so."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class Termination:
    """Turns SIGTERM (a cluster's time limit) into a question the loop can ask between two steps."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        self._main = threading.current_thread() is threading.main_thread()  # signals belong to that thread

    def __enter__(self) -> "Termination":
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

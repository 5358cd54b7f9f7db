"""Progress of a stage whose work is a list of passes: one line per finished pass, after which it goes on."""

import json
from collections.abc import Callable
from pathlib import Path

from circuitflow.provenance import canonical_json

Numbers = list[float]


class Journal:
    """Results of finished passes in order, kept in a file; with no file nothing is kept.

    The plan of passes must follow from the stage's parameters and inputs alone, as its object's folder does.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._done = _finished(path)
        self._next = 0

    def result(self, measure: Callable[[], Numbers]) -> Numbers:
        """What the next pass gives: from the file if an earlier run finished it, else measured and kept."""
        number, self._next = self._next, self._next + 1
        if number < len(self._done):
            return self._done[number]
        found = measure()
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(canonical_json(found) + "\n")
        return found

    def remove(self) -> None:
        """The stage is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _finished(path: Path | None) -> list[Numbers]:
    """Passes of an interrupted run; its last line may have been torn."""
    if path is None or not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]

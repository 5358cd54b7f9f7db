"""Ledgers: what single experiments gave, kept across runs of a stage and across changes of the list of experiments.

A stage that is asked for one more node count, window or threshold is another job than before, with another
fingerprint. What its experiments share (model, prompts, dictionaries, code that runs them, …) stays the same, and so
does the ledger that belongs to it: ``objects/<fingerprint of what is shared>/values.parquet``, one row per experiment.
A job reads it when it begins and writes it when it has all its results: a job that was killed then finds the ledger as
it was and goes on by its own journal. Tables name the ledgers behind them under ``ledgers`` in their provenance, so
that cleaning leaves these in peace.

Experiments are run together, and the last bits of a float32 sum depend on what is run beside it: a number from the
ledger agrees with one measured anew to rounding.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.provenance import canonical_json, digest
from circuitflow.store.files import write_json
from circuitflow.store.objects import OBJECTS, RECORD, Recipe
from circuitflow.store.tables import read_table, table_content, write_table

STAGE = "ledger"
VALUES = "values.parquet"


@dataclass
class Ledger:
    """Results by the key of their experiment, each ``n`` numbers; with no folder nothing is kept."""

    folder: Path | None
    recipe: Recipe
    known: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """The object's name, for the provenance of tables."""
        return self.recipe.fingerprint

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Keys without a result, each once, in the order given."""
        return [key for key in dict.fromkeys(keys) if key not in self.known]

    def values(self, keys: Sequence[str]) -> np.ndarray:
        """Results of some experiments, (keys, n); all must be known."""
        return np.stack([self.known[key] for key in keys]) if keys else np.zeros((0, 0))

    def add(self, keys: Sequence[str], values: np.ndarray) -> None:
        """Take results in; they reach the disk with :meth:`save`."""
        self.known.update(zip(keys, np.asarray(values, np.float64), strict=True))

    def save(self) -> None:
        """Write everything that is known, together with what another job may have added in the meantime."""
        if self.folder is None:
            return
        for key, value in _read(self.folder / VALUES).items():
            self.known.setdefault(key, value)
        keys = sorted(self.known)
        columns: dict[str, Any] = {"key": np.array(keys, object), "values": [self.known[key] for key in keys]}
        if not keys:
            return
        write_table(self.folder / VALUES, columns, {"recipe": self.recipe.as_dict()})
        record = {"recipe": self.recipe.as_dict(), "details": {}}
        write_json(self.folder / RECORD, {**record, "content": table_content(self.folder / VALUES)})


def open_ledger(objects: Path, recipe: Recipe, anew: bool = False) -> Ledger:
    """The ledger of everything that ``recipe`` says, in a model's folder of objects.

    :param anew: begin with nothing known, as ``--config recompute=`` wants it; results known before are overwritten.
    """
    if objects.name != OBJECTS:
        return Ledger(None, recipe, {})
    folder = objects / recipe.fingerprint
    return Ledger(folder, recipe, {} if anew else _read(folder / VALUES))


def recomputed(stage: str) -> bool:
    """Whether this run was told not to trust what is kept of a stage."""
    return stage in os.environ.get("CIRCUITFLOW_RECOMPUTE", "").split(",")


def key_of(experiment: Mapping[str, object]) -> str:
    """A digest of plain JSON values, for experiments that have no key of their own."""
    return digest(canonical_json(dict(experiment)))


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    table = read_table(path)
    return {str(key): np.array(value) for key, value in zip(table["key"], table["values"], strict=True)}

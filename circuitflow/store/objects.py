"""Kept work: an object is a folder named by the fingerprint of what shaped it; a manifest is a file that points there.

``results/{model}/objects/<fingerprint>/`` holds the files of a finished stage, or the shards and state of an unfinished
one. Manifests and tables elsewhere under ``results/{model}/`` name the object they came from; what none names can be
removed with ``circuitflow clean``.
"""

import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from circuitflow.errors import UserError
from circuitflow.provenance import canonical_json, digest, file_digest
from circuitflow.store.files import atomic_path, read_json, write_json
from circuitflow.store.tables import table_content

OBJECTS = "objects"
RECORD = "object.json"
MARKER = "IN_PROGRESS"

Digests = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes an object: the stage, its parameters, the contents of its inputs, and its code."""

    stage: str
    params: Mapping[str, Any]
    inputs: Digests
    code: str

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits; no path, time, host or version enters it."""
        return digest(canonical_json([self.stage, self.params, self.inputs, self.code]))[:16]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {"stage": self.stage, "params": self.params, "inputs": self.inputs, "code": self.code}


@dataclass(frozen=True)
class Manifest:
    """The small tracked file that stands for a store, a model or a dictionary."""

    kind: str
    object: str
    content: str
    provenance: dict[str, Any]
    details: dict[str, Any]
    sources: dict[str, Any] = field(default_factory=dict)
    """Inputs by name, as paths relative to the model's results folder (for repair)."""

    def folder(self, path: Path) -> Path:
        """The object's folder, looked for upward from the manifest's own ``path``.

        :raises UserError: the object has been removed.
        """
        for parent in path.absolute().parents:
            candidate = parent / OBJECTS / self.object
            if candidate.is_dir():
                return candidate
        raise UserError(
            f"Object {self.object} of {path} is gone from {OBJECTS}/; delete {path} and run again to remake it."
        )

    def write(self, path: Path) -> None:
        """Write the manifest; equal work gives equal bytes."""
        write_json(path, vars(self))


def read_manifest(path: Path, kind: str | None = None) -> Manifest:
    """Read a manifest and check its kind.

    :raises UserError: missing, not JSON, not a manifest, or of another kind.
    """
    value = read_json(path)
    if not isinstance(value, dict) or "object" not in value or "kind" not in value:
        raise UserError(f"File {path} is not a circuitflow manifest; delete it and run again.")
    manifest = Manifest(**value)
    if kind is not None and manifest.kind != kind:
        raise UserError(f"Manifest {path} describes a {manifest.kind}, but a {kind} is needed here.")
    return manifest


def content_of(path: Path, arrays: Sequence[str] = ()) -> str:
    """Digest of what an artefact says, not of how it was made: manifests and tables carry it, other files are hashed.

    ``arrays`` narrows a store to the arrays that are read, so that a site added beside them changes nothing.
    """
    if not path.exists():
        raise UserError(f"Input {path} does not exist; run the stage that makes it.")
    if path.suffix == ".json":
        value = read_json(path)
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            contents = value.get("details", {}).get("contents", {})
            if arrays and all(name in contents for name in arrays):
                return digest(canonical_json({name: contents[name] for name in sorted(arrays)}))
            return value["content"]
    if path.suffix == ".parquet":
        return table_content(path) or file_digest(path)
    return file_digest(path)


class ObjectFolder:
    """The folder of one recipe's work: open it, do what is missing, :meth:`finish` it.

    As a context manager it holds a lock for the time of the work, so that two processes never write one object.
    """

    def __init__(self, root: Path, recipe: Recipe, recompute: bool = False) -> None:
        self.recipe = recipe
        self.path = root / OBJECTS / recipe.fingerprint
        self._recompute = recompute
        self._lock: int | None = None

    @property
    def complete(self) -> bool:
        """Whether the work is done and nothing is left to compute."""
        return (self.path / RECORD).is_file()

    def record(self) -> dict[str, Any]:
        """What :meth:`finish` wrote: recipe, content, details and names of the files."""
        return dict(read_json(self.path / RECORD))

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        if self._recompute:
            _empty(self.path)
        if not self.complete:
            (self.path / MARKER).touch()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def finish(self, content: str, details: Mapping[str, Any]) -> None:
        """Declare the work done. From here on the object is only read."""
        write_json(
            self.path / RECORD, {"recipe": self.recipe.as_dict(), "content": content, "details": details}
        )
        (self.path / MARKER).unlink(missing_ok=True)


def is_busy(folder: Path) -> bool:
    """Whether a process is working in this object's folder now."""
    try:
        os.close(_lock(folder))
    except UserError:
        return True
    return False


def _lock(folder: Path) -> int:
    """An advisory lock on the folder itself; it ends with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"Another process is already working in {folder}; wait for it to end, or end it, and run again."
        ) from None
    except OSError:
        pass  # file systems without locks: Snakemake's own lock has to do
    return handle


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def publish(source: Path, target: Path) -> None:
    """Copy a finished file of an object to its declared place; the copy may be deleted, the object stays."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)

"""Kept objects that nothing needs any more: finding them, telling their size, removing them."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitflow.store.files import read_json
from circuitflow.store.objects import MARKER, OBJECTS, RECORD, is_busy
from circuitflow.store.tables import read_provenance

REMOVED = ".removed-"
"""Prefix of an object on its way out: renamed first, so that a half-removed object is never taken for a whole one."""


@dataclass(frozen=True)
class Leftover:
    """An object that no manifest, table or other artefact names."""

    path: Path
    size: int
    """Bytes in its files."""
    partial: bool
    """Whether its work was never finished; running the stage again goes on with it."""
    stage: str | None
    """The stage that made it, known of finished objects."""


def unreferenced(results: Path) -> list[Leftover]:
    """Objects below ``results/*/objects`` that no artefact of their model's folder names, largest first.

    Objects in which a process of this machine is working are left out.

    :raises UserError: a JSON or Parquet file among the artefacts cannot be read, so that it may name any object.
    """
    found = []
    for objects in results.glob(f"*/{OBJECTS}"):
        named = _needed_objects(objects.parent)
        folders = [folder for folder in objects.iterdir() if folder.is_dir()]
        found += [_leftover(folder) for folder in folders if folder.name not in named and not is_busy(folder)]
    return sorted(found, key=lambda leftover: (-leftover.size, leftover.path))


def remove(leftovers: Iterable[Leftover]) -> list[Leftover]:
    """Remove objects that :func:`unreferenced` listed, except any that have come into use since; return what is gone.

    Meant for times when no workflow runs: a job on another machine of a cluster cannot be seen from here.

    :raises UserError: as for :func:`unreferenced`.
    """
    wanted = list(leftovers)
    named = {model: _needed_objects(model) for model in {_model(leftover) for leftover in wanted}}
    idle = [leftover for leftover in wanted if leftover.path.name not in named[_model(leftover)]]
    return [leftover for leftover in idle if _remove(leftover.path)]


def _model(leftover: Leftover) -> Path:
    return leftover.path.parent.parent


def _needed_objects(model: Path) -> set[str]:
    """Objects that an artefact of a model's folder points to or was copied from, or was made with.

    Results name what they were made with by content: an object stays while a kept result says so, although its
    manifest has since been replaced by another's (as when a second task takes dictionaries of the same name).
    """
    names: set[str] = set()
    contents: set[str] = set()
    for path in _artefacts(model):
        value = read_json(path) if path.suffix == ".json" else {"provenance": read_provenance(path)}
        names.update(_names_in(value))
        contents.update(_contents_in(value))
    records = {path.parent.name: read_json(path) for path in sorted(model.glob(f"{OBJECTS}/*/{RECORD}"))}
    contents -= {records[name]["content"] for name in names if name in records}
    for name, record in records.items():  # of objects with equal content one is enough
        if record["content"] in contents:
            contents.remove(record["content"])
            names.add(name)
    return names


def _artefacts(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != OBJECTS:
            yield from _artefacts(path)
        elif path.suffix in (".json", ".parquet") and not path.name.startswith("."):
            yield path


def _names_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("object"), str):
            yield value["object"]
        ledgers = value.get("ledgers")
        yield from ledgers if isinstance(ledgers, list) else ()
        yield from _names_in(value.get("provenance"))


def _contents_in(value: Any) -> Iterator[str]:
    """Digests of what an artefact was made from."""
    provenance = value.get("provenance") if isinstance(value, dict) else None
    if isinstance(provenance, dict):
        yield from _texts(provenance.get("inputs"))
        yield from _texts(provenance.get("dictionaries"))
        yield from _contents_in(provenance)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _leftover(folder: Path) -> Leftover:
    finished = (folder / RECORD).is_file() and not (folder / MARKER).exists()
    stage = read_json(folder / RECORD)["recipe"]["stage"] if finished else None
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Leftover(folder, size, partial=not finished and not folder.name.startswith(REMOVED), stage=stage)


def _remove(folder: Path) -> bool:
    """Remove an object unless a process has begun to work in it; True if it is gone."""
    if is_busy(folder):
        return False
    if not folder.name.startswith(REMOVED):
        folder = folder.rename(folder.with_name(REMOVED + folder.name))
    shutil.rmtree(folder)
    return True

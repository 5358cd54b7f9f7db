"""Stores: Zarr v3 arrays cut into shard files along their first axis.

A store is a folder with ``store.zarr`` (readable by any Zarr v3 library), ``shards.json`` (size and digest of every
shard file, written once all are there) and, while it is written, ``journal.jsonl`` (the same for those done so far).
A kill at any moment loses the shard in hand and nothing else. Where Zarr would answer a missing shard with fill
values, :class:`Store` answers with an error that names the file and the command that repairs it.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from circuitflow.errors import UserError, nearest
from circuitflow.provenance import canonical_json, digest
from circuitflow.store.files import atomic_path, read_json, sync_file, write_json
from circuitflow.store.layout import (
    STORED,
    ZARR,
    ArraySpec,
    Layout,
    Shard,
    array_contents,
    content_digest,
    narrow,
    widen,
    write_metadata,
)
from circuitflow.store.objects import read_manifest

__all__ = ["ArraySpec", "Store", "StoreWriter", "open_store"]

SHARDS = "shards.json"
JOURNAL = "journal.jsonl"

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


Done = dict[int, dict[str, Shard]]
"""Finished shard files: index → array → size and digest."""


class StoreWriter:
    """Writes a store shard by shard and goes on where an interrupted run stopped.

    A shard counts as done once its files are on the disk and its line is in the journal; one that was being written
    when the process died is written again. ``attributes`` (plain JSON) travel with the store and count as its content.

    :param folder: the object's folder.
    :param arrays: specifications by name; names may contain ``/``, and all arrays have the same number of rows.
    :param shard_rows: rows of every shard but the last.
    :raises UserError: the folder holds a store of another layout.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, ArraySpec],
        shard_rows: int,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        if not arrays or shard_rows < 1 or len({spec.shape[0] for spec in arrays.values()}) != 1:
            raise ValueError(
                "a store needs arrays with the same number of rows, and shards of at least one row"
            )
        self.folder = folder
        self.layout = Layout(dict(arrays), shard_rows, dict(attributes or {}))
        self._done = self._recover()
        write_metadata(folder, self.layout)

    def missing(self) -> list[int]:
        """Indices of the shards still to write, in order."""
        whole = {index for index, shards in self._done.items() if shards.keys() == self.layout.arrays.keys()}
        return [index for index in range(self.layout.n_shards) if index not in whole]

    def bounds(self, index: int) -> tuple[int, int]:
        """Rows ``start, stop`` of a shard."""
        return self.layout.bounds(index)

    def write_shard(self, index: int, values: Mapping[str, np.ndarray]) -> None:
        """Write one shard of every array: ``values[name]`` has shape (stop − start, …) of :meth:`bounds`.

        In a repair, the arrays whose file of this shard is intact keep it.

        :raises UserError: values are not finite or do not fit the element type, or the disk is full.
        """
        if values.keys() != self.layout.arrays.keys():
            raise ValueError(f"a shard needs {sorted(self.layout.arrays)}, got {sorted(values)}")
        shards = dict(self._done.get(index, {}))
        lacking = [name for name in self.layout.arrays if name not in shards]
        try:
            shards |= {name: self._write_array(name, index, values[name]) for name in lacking}
            self._append({"shard": index, "arrays": shards})
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self._discard(index, lacking)
            raise _full_disk(self.folder, self._shard_bytes(index, lacking)) from error
        self._done[index] = shards

    def finish(self) -> tuple[str, dict[str, Any]]:
        """Close the store: write ``shards.json`` and return the digest of the data and the manifest's details."""
        if missing := self.missing():
            raise ValueError(f"{len(missing)} shards of {self.folder} are still to be written")
        shards = {
            name: [self._done[index][name] for index in range(self.layout.n_shards)]
            for name in self.layout.arrays
        }
        contents = array_contents(self.layout, shards)
        write_json(self.folder / SHARDS, {**self.layout.as_dict(), "shards": shards})
        (self.folder / JOURNAL).unlink(missing_ok=True)
        for pattern in ("*.partial", ".*.tmp"):  # temporary names of Zarr and of ours that a kill left behind
            for leftover in self.folder.rglob(pattern):
                leftover.unlink()
        return content_digest(contents), {**self.layout.as_dict(), "contents": contents}

    def _recover(self) -> Done:
        """Shard files of an earlier run that are still there at their recorded size."""
        done = _read_done(self.folder, self.layout)
        kept = {index: self._present(index, shards) for index, shards in done.items()}
        lines: list[dict[str, Any]] = [{"layout": self.layout.as_dict()}]
        lines += [{"shard": index, "arrays": shards} for index, shards in sorted(kept.items())]
        with atomic_path(self.folder / JOURNAL) as temporary:  # also drops a line torn by a kill
            temporary.write_text("".join(canonical_json(line) + "\n" for line in lines), encoding="utf-8")
        return kept

    def _present(self, index: int, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        files = {name: self.layout.file(self.folder, name, index) for name in shards}
        return {
            name: shards[name]
            for name, file in files.items()
            if file.is_file() and file.stat().st_size == shards[name].size
        }

    def _write_array(self, name: str, index: int, values: np.ndarray) -> Shard:
        spec = self.layout.arrays[name]
        start, stop = self.bounds(index)
        if values.shape != (stop - start, *spec.shape[1:]):
            raise ValueError(
                f"shard {index} of {name} has shape {values.shape}, but rows {start} to {stop} are needed"
            )
        stored = narrow(values, spec.dtype, f"array '{name}', rows {start} to {stop - 1}")
        file = self.layout.file(self.folder, name, index)
        file.unlink(missing_ok=True)  # Zarr would merge into a half-written shard, and fail on its checksum
        # Without write_empty_chunks Zarr leaves out chunks of zeros, and a shard of zeros has no file at all.
        array = _open_array(self.folder, name, "r+").with_config({"write_empty_chunks": True})
        array[start:stop] = stored
        sync_file(file)
        return Shard(file.stat().st_size, digest(stored.tobytes()))

    def _shard_bytes(self, index: int, names: Sequence[str]) -> int:
        start, stop = self.bounds(index)
        return (stop - start) * sum(self.layout.arrays[name].row_bytes for name in names)

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(canonical_json(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _discard(self, index: int, names: Sequence[str]) -> None:
        for name in names:
            self.layout.file(self.folder, name, index).unlink(missing_ok=True)


class DamagedShardError(UserError):
    """A shard file is missing or is not what was written."""

    def __init__(self, file: Path, problem: str, manifest: Path) -> None:
        super().__init__(f"Shard {file} {problem}; repair it with: circuitflow verify --repair {manifest}")
        self.file, self.problem = file, problem


class Store:
    """A finished store, opened for reading by :func:`open_store`.

    Sizes of all shard files are checked here (unless ``check_sizes`` is off), checksums whenever a shard is read.

    :raises UserError: the store is unfinished, or a shard is missing or of another size (:class:`DamagedShardError`).
    """

    def __init__(self, folder: Path, manifest: Path, check_sizes: bool = True) -> None:
        self.folder = folder
        self.manifest = manifest
        if not (folder / SHARDS).is_file():
            raise DamagedShardError(folder / SHARDS, "is missing", manifest)
        table = read_json(folder / SHARDS)
        self.layout = Layout.from_dict(table)
        self._shards = {name: [Shard(*shard) for shard in shards] for name, shards in table["shards"].items()}
        self._zarr: dict[str, zarr.Array] = {}
        if check_sizes:
            self._check_sizes()

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        """Specifications by name."""
        return self.layout.arrays

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes that the writer was given."""
        return self.layout.attributes

    @property
    def rows(self) -> int:
        """Length of the first axis of every array."""
        return self.layout.rows

    @cached_property
    def content(self) -> str:
        """Digest of the data, the same as in the manifest."""
        return content_digest(array_contents(self.layout, self._shards))

    def shape(self, array: str) -> tuple[int, ...]:
        """Whole shape of an array.

        :raises UserError: the store has no such array.
        """
        return self._spec(array).shape

    def read(self, array: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start`` to ``stop`` (all by default): float32 for floating types, int32 for integers.

        :raises UserError: no such array, or a shard is missing or damaged.
        """
        return widen(self.read_stored(array, start, stop), self._spec(array).dtype)

    def read_stored(self, array: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Like :meth:`read` in the elements of the disk, half the memory for 16-bit types; see :func:`widen`."""
        spec = self._spec(array)
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} of {array}, which has {self.rows}")
        result = np.empty((stop - start, *spec.shape[1:]), STORED[spec.dtype])
        for index, first, last in self._pieces(start, stop):
            result[first - start : last - start] = self._read_shard(array, index, first, last)
        return result

    def check_shard(self, array: str, index: int) -> None:
        """Read a whole shard and compare its values with the digest taken when they were written.

        :raises DamagedShardError: they are not the same.
        """
        values = self._read_shard(array, index, *self.layout.bounds(index))
        if digest(values.tobytes()) != self._shards[array][index].digest:
            raise self._damaged(array, index, "holds other values than were written")

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        size = self.layout.shard_rows
        for index in range(start // size, -(-stop // size)):
            first, last = self.layout.bounds(index)
            yield index, max(first, start), min(last, stop)

    def _read_shard(self, array: str, index: int, start: int, stop: int) -> np.ndarray:
        self._check_size(
            array, index
        )  # it may have gone since the store was opened, and Zarr would return zeros
        opened = self._opened(array)
        try:
            return np.asarray(opened[start:stop])
        except (ValueError, OSError) as error:
            raise self._damaged(array, index, f"is damaged ({error})") from error

    def _opened(self, array: str) -> zarr.Array:
        if array not in self._zarr:
            try:
                opened = _open_array(self.folder, array, "r")
            except (ValueError, OSError, KeyError) as error:
                file = self.folder / ZARR / array / "zarr.json"
                raise DamagedShardError(file, f"is damaged ({error})", self.manifest) from error
            self._zarr[array] = opened
        return self._zarr[array]

    def _check_sizes(self) -> None:
        if (self.folder / JOURNAL).exists():
            raise DamagedShardError(self.folder / JOURNAL, "tells of an unfinished repair", self.manifest)
        for name in self.arrays:
            for index in range(self.layout.n_shards):
                self._check_size(name, index)

    def _check_size(self, array: str, index: int) -> None:
        expected = self._shards[array][index].size
        try:
            size = self.layout.file(self.folder, array, index).stat().st_size
        except FileNotFoundError:
            raise self._damaged(array, index, "is missing") from None
        if size != expected:
            raise self._damaged(array, index, f"has {size} bytes instead of {expected}")

    def _damaged(self, array: str, index: int, problem: str) -> DamagedShardError:
        return DamagedShardError(self.layout.file(self.folder, array, index), problem, self.manifest)

    def _spec(self, array: str) -> ArraySpec:
        if array not in self.arrays:
            raise UserError(f"Store {self.manifest} has no array '{array}': {nearest(array, self.arrays)}.")
        return self.arrays[array]


def open_store(manifest: Path) -> Store:
    """Open the store that a manifest points to, checking that all its shard files are there at their recorded sizes.

    :raises UserError: no such manifest, its object is gone, it holds other data than the manifest says, or a shard is
        missing or of another size.
    """
    described = read_manifest(manifest, "store")
    store = Store(described.folder(manifest), manifest)
    if store.content != described.content:
        raise UserError(
            f"Store {store.folder} holds other data than {manifest} says; delete both and run again."
        )
    return store


def _read_done(folder: Path, layout: Layout) -> Done:
    """Shards recorded by earlier runs: those of the finished table, then those of the journal."""
    done: Done = {}
    if (folder / SHARDS).is_file():
        table = read_json(folder / SHARDS)
        _check_layout(folder, table, layout)
        for index in range(layout.n_shards):
            done[index] = {name: Shard(*table["shards"][name][index]) for name in layout.arrays}
    for line in _journal_lines(folder / JOURNAL):
        if "layout" in line:
            _check_layout(folder, line["layout"], layout)
        else:
            done[line["shard"]] = {name: Shard(*shard) for name, shard in line["arrays"].items()}
    return done


def _journal_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a journal; the last may have been torn by a kill."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _check_layout(folder: Path, found: Mapping[str, Any], layout: Layout) -> None:
    expected = layout.as_dict()
    if any(found[key] != json.loads(canonical_json(expected[key])) for key in expected):
        raise UserError(f"Folder {folder} holds a store of another layout; delete the folder and run again.")


def _open_array(folder: Path, name: str, mode: Any) -> zarr.Array:
    return zarr.open_array(folder / ZARR / name, mode=mode, zarr_format=3)


def _full_disk(folder: Path, needed: int) -> UserError:
    return UserError(
        f"The disk of {folder} is full ({needed} bytes needed for the next shard); free some space and run again: "
        "finished shards are kept."
    )

"""What a store looks like: its arrays, their element types, how they are cut, and Zarr's metadata for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from circuitflow.errors import UserError, nearest
from circuitflow.provenance import canonical_json, digest
from circuitflow.store.files import atomic_path

ZARR = "store.zarr"

STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int32": "<i4"}
"""Element types of a store and how Zarr holds them; it has no bfloat16, so those are kept as their 16 bits."""

CHUNK_BYTES = 1 << 20
"""Aim for the inner chunks of a shard, the smallest piece that is read and checked at once."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: its whole shape (rows first) and its element type, a key of :data:`STORED`."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in STORED:
            raise UserError(
                f"A store cannot hold elements of type '{self.dtype}': {nearest(self.dtype, STORED)}."
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk."""
        return int(np.dtype(STORED[self.dtype]).itemsize * np.prod(self.shape[1:], dtype=np.int64))


class Shard(NamedTuple):
    """What is known of a finished shard file: its size in bytes and the digest of the values in it."""

    size: int
    digest: str


@dataclass(frozen=True)
class Layout:
    """Everything about a store but its values."""

    arrays: dict[str, ArraySpec]
    shard_rows: int
    attributes: dict[str, Any]

    @property
    def rows(self) -> int:
        """Length of the first axis, the same for every array."""
        return next(iter(self.arrays.values())).shape[0]

    @property
    def n_shards(self) -> int:
        """Shard files per array; the last may hold fewer rows than the others."""
        return -(-self.rows // self.shard_rows)

    def bounds(self, index: int) -> tuple[int, int]:
        """Rows ``start, stop`` of a shard."""
        return index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows)

    def file(self, folder: Path, array: str, index: int) -> Path:
        """File of one shard: Zarr's default chunk key, 0 along every axis but the first."""
        rank = len(self.arrays[array].shape)
        return folder.joinpath(ZARR, *array.split("/"), "c", str(index), *["0"] * (rank - 1))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form, used in sidecars and manifests."""
        return {
            "arrays": {
                name: {"shape": list(spec.shape), "dtype": spec.dtype} for name, spec in self.arrays.items()
            },
            "shard_rows": self.shard_rows,
            "attributes": self.attributes,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`as_dict`."""
        arrays = {
            name: ArraySpec(tuple(spec["shape"]), spec["dtype"]) for name, spec in value["arrays"].items()
        }
        return cls(arrays, value["shard_rows"], value["attributes"])


def array_contents(layout: Layout, shards: Mapping[str, Sequence[Shard]]) -> dict[str, str]:
    """Digest of each array's data alone: attributes, shape and values, whatever the encoding of its files.

    Every array has its own, so that what reads one array does not depend on those beside it.
    """
    described = layout.as_dict()
    shared = {"shard_rows": layout.shard_rows, "attributes": layout.attributes}
    return {
        name: digest(
            canonical_json(
                {**shared, **described["arrays"][name], "digests": [shard.digest for shard in shards[name]]}
            )
        )
        for name in layout.arrays
    }


def content_digest(contents: Mapping[str, str]) -> str:
    """Digest of a store's data from those of its arrays."""
    return digest(canonical_json(dict(contents)))


def narrow(values: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """Values as they are stored; bfloat16 is rounded to the nearest, ties to even.

    :raises UserError: a value is not finite, or too large for ``dtype``; ``what`` names it.
    """
    target = np.dtype(STORED[dtype])
    if dtype == "int32" or values.dtype.kind in "iub":
        return _narrow_integers(values, dtype, what)
    if not np.isfinite(values).all():
        raise UserError(
            f"Values of {what} are not finite (NaN or infinity); check the model and its precision."
        )
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4")
        stored = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(target)
        overflow = ((stored & 0x7F80) == 0x7F80).any()
    else:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values).astype(target, copy=False)
        overflow = not np.isfinite(stored).all()
    if overflow:
        raise UserError(
            f"Values of {what} reach {float(np.abs(values).max()):.4g}, too large for {dtype}; "
            "set dtype to bfloat16 or float32."
        )
    return stored


def _narrow_integers(values: np.ndarray, dtype: str, what: str) -> np.ndarray:
    info = np.iinfo(np.int32)
    fits = values.dtype.kind in "iub" and (
        not values.size or info.min <= values.min() <= values.max() <= info.max
    )
    if dtype != "int32" or not fits:
        raise ValueError(f"{what}: {values.dtype} values do not fit {dtype}")
    return values.astype(STORED[dtype])


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of :func:`narrow`: float32 for floating types, integers as they are."""
    if dtype == "bfloat16":
        return (stored.astype("<u4") << 16).view("<f4")
    return stored if dtype == "int32" else stored.astype(np.float32, copy=False)


def write_metadata(folder: Path, layout: Layout) -> None:
    """Zarr's own metadata, made in memory so that every file of it appears in one step."""
    files: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(files), zarr_format=3, attributes=layout.attributes)
    for name, spec in layout.arrays.items():
        inner = _chunk_rows(spec, layout.shard_rows)
        root.create_array(
            name,
            shape=spec.shape,
            dtype=STORED[spec.dtype],
            shards=(layout.shard_rows, *spec.shape[1:]),
            chunks=(inner, *spec.shape[1:]),
            filters=(),
            serializer=BytesCodec(endian="little"),
            compressors=(Crc32cCodec(),),
            fill_value=0,
            attributes={"dtype": spec.dtype},
        )
    for key, value in files.items():
        with atomic_path(folder / ZARR / key) as temporary:
            temporary.write_bytes(value.to_bytes())


def _chunk_rows(spec: ArraySpec, shard_rows: int) -> int:
    """The divisor of ``shard_rows`` whose chunks come nearest to :data:`CHUNK_BYTES` (by ratio)."""
    aim = CHUNK_BYTES / max(spec.row_bytes, 1)
    divisors = [rows for rows in range(1, shard_rows + 1) if shard_rows % rows == 0]
    return min(divisors, key=lambda rows: max(rows / aim, aim / rows))

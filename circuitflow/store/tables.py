"""Parquet tables with provenance: equal data and equal provenance give equal bytes."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from circuitflow.errors import UserError
from circuitflow.provenance import canonical_json, digest
from circuitflow.store.files import atomic_path

CONTENT_KEY = b"circuitflow.content"
PROVENANCE_KEY = b"circuitflow.provenance"

Columns = Mapping[str, Sequence[Any] | np.ndarray]


def write_table(path: Path, columns: Columns, provenance: Mapping[str, Any] | None = None) -> None:
    """Write columns of equal length as Parquet, with provenance and a digest of the data alone in its metadata."""
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    metadata = {
        CONTENT_KEY: _content(table).encode(),
        PROVENANCE_KEY: canonical_json(dict(provenance or {})).encode(),
    }
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")


def read_table(path: Path) -> dict[str, np.ndarray]:
    """Columns as NumPy arrays; text and lists come as object arrays.

    :raises UserError: the file is missing or is not Parquet.
    """
    table = _open(path, lambda: pq.read_table(path))
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


def read_provenance(path: Path) -> dict[str, Any]:
    """The provenance that :func:`write_table` put into the file (empty if none)."""
    return dict(json.loads((_metadata(path)).get(PROVENANCE_KEY, b"{}")))


def table_content(path: Path) -> str | None:
    """Digest of the table's data alone, as recorded when it was written; None in a table made elsewhere."""
    value = _metadata(path).get(CONTENT_KEY)
    return value.decode() if value else None


def _metadata(path: Path) -> dict[bytes, bytes]:
    return dict(_open(path, lambda: pq.read_schema(path)).metadata or {})


def _open(path: Path, read: Any) -> Any:
    try:
        return read()
    except FileNotFoundError:
        raise UserError(f"Table {path} does not exist; run the stage that makes it.") from None
    except pa.ArrowInvalid as error:
        raise UserError(
            f"Table {path} is not a readable Parquet file ({error}); delete it and run again."
        ) from None


def _content(table: pa.Table) -> str:
    sink = io.BytesIO()
    bare = table.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(sink, bare.schema) as writer:
        writer.write_table(bare)
    return digest(sink.getvalue())

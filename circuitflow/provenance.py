"""Digests of values and files, and versions of libraries: what an artefact was made from."""

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

REPORTED_LIBRARIES = ("circuitflow", "torch", "transformers", "numpy", "zarr", "safetensors", "pyarrow")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spare space, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: str | bytes) -> str:
    """32 hexadecimal digits (BLAKE2b, 128 bits) of a text or of bytes."""
    data = value.encode() if isinstance(value, str) else value
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """:func:`digest` of a file's bytes, read in pieces."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the libraries that can change a number."""
    found = {}
    for name in REPORTED_LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

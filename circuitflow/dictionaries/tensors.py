"""Safetensors files with one JSON description: equal contents give equal bytes, and half a file is never seen."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from circuitflow.errors import UserError
from circuitflow.provenance import canonical_json
from circuitflow.store.files import atomic_path

DESCRIPTION = "circuitflow"
"""The one metadata key: with more than one, their order in the file changes from run to run."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Replace a file in one step.

    :raises OSError: the disk is full or not writable.
    """
    # Copies, because safetensors refuses tensors that share memory (a tied encoder and decoder).
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(kept, temporary, metadata={DESCRIPTION: canonical_json(dict(description))})
        except SafetensorError as error:
            raise _system_error(error, path) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors by name, and the description; None if the file was not written by :func:`write_tensors`.

    :raises UserError: the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"File {path} does not exist; check the path, or run the stage that makes it.")
    try:
        with safe_open(path, framework="pt") as opened:
            description = json.loads((opened.metadata() or {}).get(DESCRIPTION, "null"))
            return {name: opened.get_tensor(name) for name in opened.keys()}, description  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"File {path} cannot be read as safetensors ({error}); delete it and run again."
        ) from None


def _system_error(error: SafetensorError, path: Path) -> Exception:
    """The operating system's error inside one of safetensors', which names it only in its text."""
    found = re.search(r"code: (\d+)|os error (\d+)", str(error))
    if found is None:
        return error
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number), str(path))

"""Folders of weights as other libraries read them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.errors import UserError
from circuitflow.store.files import atomic_path, write_json


def check_writable(format_name: str, dictionary: Dictionary) -> None:
    """Check what no other library holds.

    :raises UserError: there is no encoder, or there are several sites.
    """
    if dictionary.W_enc is None:
        raise UserError(
            f"Format {format_name} needs an encoder, and this dictionary is a decoder alone; write it as circuitflow."
        )
    if len(dictionary.reads) != 1 or len(dictionary.writes) != 1:
        raise UserError(
            f"Format {format_name} holds dictionaries that read one site and write one, and this one reads "
            f"{', '.join(dictionary.reads)} and writes {', '.join(dictionary.writes)}; write it as circuitflow."
        )


def description(dictionary: Dictionary) -> dict[str, Any]:
    """What other libraries have no place for: kind, sites, and the outlier rule, which they do not apply."""
    return {
        "kind": dictionary.kind,
        "reads": list(dictionary.reads),
        "writes": list(dictionary.writes),
        "skip": dictionary.skip.described(),
        "notes": dict(dictionary.notes),
    }


def write_folder(
    folder: Path, settings: Mapping[str, Mapping[str, Any]], file: str, tensors: Mapping[str, Tensor]
) -> None:
    """Write a file of weights, in float32, and JSON files of settings by name.

    :raises UserError: the folder holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is in use; name a folder that does not exist yet, or is empty.")
    write_weights(folder / file, tensors)
    for name, values in settings.items():
        write_json(folder / name, dict(values))


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, in float32."""
    # Copies, because safetensors refuses tensors that share memory (a tied encoder and decoder).
    kept = {
        name: tensor.detach().cpu().to(torch.float32).contiguous().clone() for name, tensor in tensors.items()
    }
    with atomic_path(path) as temporary:
        save_file(kept, temporary)

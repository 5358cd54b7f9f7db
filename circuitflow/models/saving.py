"""Writing a prepared model: one folder that transformers can load, the same bytes whenever and wherever it is made."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from circuitflow.jobs import Output
from circuitflow.models.architectures import MODEL_FOLDER, Architecture, architecture_of, check_site
from circuitflow.models.sites import parse_site
from circuitflow.provenance import canonical_json, digest, file_digest
from circuitflow.store.files import read_json

_INCIDENTAL = ("transformers_version", "_name_or_path", "_model_name_or_path", "is_local", "local_files_only")
"""Keys of saved settings that tell where and with what the model was made, not what it is."""


def check_model(config: Any, architecture: str, required_sites: Sequence[str]) -> Architecture:
    """The adapter of a model that has all required sites; needs the model's configuration only.

    :raises UserError: unsupported architecture, or a site that the model does not have.
    """
    arch = architecture_of(config, architecture)
    for name in required_sites:
        check_site(parse_site(name), arch, int(config.num_hidden_layers))
    return arch


def save_model(hf: Any, tokenizer: Any, arch: Architecture, out: Output) -> None:
    """Save weights (safetensors), configuration and tokenizer below ``out.folder``; set ``out.content`` and details."""
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    folder = out.folder / MODEL_FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.json"):
        if path.name != "tokenizer.json":
            _leave_out_incidentals(path)
    files = {
        path.relative_to(folder).as_posix(): file_digest(path) for path in folder.rglob("*") if path.is_file()
    }
    out.content = digest(canonical_json(files))
    out.details |= {
        "architecture": arch.name,
        "parallel": arch.parallel,
        "layers": int(hf.config.num_hidden_layers),
        "d_model": int(hf.config.hidden_size),
        "vocab": int(hf.config.vocab_size),
        "parameters": sum(parameter.numel() for parameter in hf.parameters()),
        "dtype": str(hf.dtype).removeprefix("torch."),
    }


def _leave_out_incidentals(path: Path) -> None:
    value = {key: entry for key, entry in read_json(path).items() if key not in _INCIDENTAL}
    path.write_text(json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""The result of a stage that trains or imports a dictionary: its files, and what its manifest tells of it."""

import json
from pathlib import Path
from typing import Any

from circuitflow.dictionaries.dictionary import WEIGHTS_FILE, load_dictionary
from circuitflow.jobs import Output
from circuitflow.provenance import canonical_json, digest, file_digest

LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"


def describe(out: Output) -> None:
    """Content and details of the manifest of a finished dictionary."""
    dictionary = load_dictionary(out.folder / WEIGHTS_FILE)
    lines = read_log(out.folder / LOG_FILE)
    out.content = digest(
        canonical_json([file_digest(out.folder / name) for name in (WEIGHTS_FILE, LOG_FILE)])
    )
    out.details.update(
        kind=dictionary.kind,
        site=dictionary.reads[0],
        d_model=dictionary.d_model,
        d_dict=dictionary.d_dict,
        settings=dict(dictionary.settings),
        skip={"positions": list(dictionary.skip.positions), "max_norm": dictionary.skip.max_norm},
        notes=dict(dictionary.notes),
        last=lines[-1] if lines else None,
        checkpoints=sorted(file.name for file in (out.folder / CHECKPOINTS).glob("step_*.safetensors")),
    )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

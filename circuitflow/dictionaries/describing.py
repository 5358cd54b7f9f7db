"""The result of a stage that trains or imports a dictionary: its files, and what its manifest tells of it."""

import json
from collections.abc import Sequence
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
        skip=dictionary.skip.described(),
        notes=dict(dictionary.notes),
        last=lines[-1] if lines else None,
        checkpoints=sorted(file.name for file in (out.folder / CHECKPOINTS).glob("step_*.safetensors")),
    )


def describe_family(out: Output, files: Sequence[str]) -> None:
    """Content and details of the manifest of dictionaries that span sites, from their weights in the folder."""
    members = [load_dictionary(out.folder / name) for name in files]
    lines = read_log(out.folder / LOG_FILE)
    out.content = digest(canonical_json([file_digest(out.folder / name) for name in (*files, LOG_FILE)]))
    folder = out.folder / CHECKPOINTS
    out.details.update(
        kind=members[0].kind,
        reads=[list(member.reads) for member in members],
        writes=[list(member.writes) for member in members],
        d_dict=members[0].d_dict,
        settings=dict(members[0].settings),
        skips=[member.skip.described() for member in members],
        notes=[dict(member.notes) for member in members],
        last=lines[-1] if lines else None,
        checkpoints=sorted(str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")),
    )


def files_of(members: int, name: str | None = None) -> list[str]:
    """Names of the files of finished dictionaries, or of a checkpoint of that name."""
    if members == 1:
        return [WEIGHTS_FILE if name is None else f"{name}.safetensors"]
    start = "" if name is None else f"{name}/"
    return [f"{start}member_{number}.safetensors" for number in range(members)]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

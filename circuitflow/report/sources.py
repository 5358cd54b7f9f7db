"""Where the page's numbers come from: each artefact with its stage, parameters and digests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitflow.provenance import canonical_json
from circuitflow.store.files import read_json
from circuitflow.store.objects import content_of
from circuitflow.store.tables import read_provenance


@dataclass(frozen=True)
class Artefact:
    """One file behind the page."""

    file: str
    stage: str
    content: str
    code: str
    params: str
    inputs: str


def artefacts(inputs: Mapping[str, Any]) -> tuple[list[Artefact], dict[str, str]]:
    """Tables and JSON files among the inputs, and the library versions that they were made with."""
    found, versions = [], {}
    for path in _files(inputs):
        provenance = _provenance(path)
        if provenance:
            versions.update(provenance.get("versions", {}))
            found.append(
                Artefact(
                    file="/".join(path.parts[-2:]),
                    stage=str(provenance.get("stage", "")),
                    content=content_of(path),
                    code=str(provenance.get("code", "")),
                    params=canonical_json(provenance.get("params", {})),
                    inputs=canonical_json(provenance.get("inputs", {})),
                )
            )
    return found, versions


def _files(inputs: Mapping[str, Any]) -> list[Path]:
    listed = [path for value in inputs.values() for path in (value if isinstance(value, list) else [value])]
    return [path for path in listed if path.suffix in (".parquet", ".json")]


def _provenance(path: Path) -> dict[str, Any]:
    if path.suffix == ".parquet":
        return read_provenance(path)
    value = read_json(path)
    return dict(value.get("provenance", {})) if isinstance(value, dict) else {}

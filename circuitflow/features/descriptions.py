"""Descriptions of features, read back: what figures and the page need of them. Imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuitflow.features.tokens import distinct
from circuitflow.store.files import read_json

Description = Mapping[str, Any]
Descriptions = Mapping[tuple[str, int], Description]
"""By (site, feature number)."""


def read_descriptions(paths: Sequence[Path]) -> dict[tuple[str, int], Description]:
    """Feature descriptions of several sites, as written by the stage describe_features."""
    found = {}
    for path in paths:
        described = read_json(path)
        for feature in described["features"]:
            found[described["site"], int(feature["feature"])] = feature
    return found


def fires_on(feature: Description | None, limit: int = 4, where: str = "text") -> list[str]:
    """The tokens a feature fires on, the strongest first: in corpus text ("text") or in the task's prompts ("task").

    Empty for a feature without a description, and where the dictionary could not encode.
    """
    if feature is None:
        return []
    entries = feature.get("fires_on", []) if where == "text" else feature.get("task", {}).get("tokens", [])
    return distinct((entry["token"] for entry in entries), limit)


def promotes(feature: Description | None, limit: int = 4) -> list[str]:
    """The tokens that a feature's direction raises most."""
    return [] if feature is None else distinct((entry["token"] for entry in feature["logits"]["top"]), limit)

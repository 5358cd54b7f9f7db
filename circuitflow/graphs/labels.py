"""What the features of graphs are, in a few words: descriptions read back, for figures, viewers and tables."""

from collections.abc import Mapping
from pathlib import Path

from circuitflow.errors import UserError
from circuitflow.features.descriptions import Description, fires_on, promotes
from circuitflow.features.tokens import visible
from circuitflow.models.sites import parse_site
from circuitflow.store.files import read_json

FIRES, PROMOTES = 3, 2
"""Tokens in a label."""


def read_descriptions(path: Path) -> dict[tuple[int, int], Description]:
    """Descriptions by (layer, feature), as the stage describe_graph_features writes them.

    :raises UserError: the file is another.
    """
    value = read_json(path)
    try:
        return {
            (_layer(described["site"]), int(feature["feature"])): feature
            for described in value["sites"]
            for feature in described["features"]
        }
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"File {path} has no descriptions of graph features; name graphs/DICTIONARIES/features.json of a run."
        ) from None


def label(description: Description) -> str:
    """The tokens that a feature fires on, and after an arrow those that it promotes."""
    fired = [_word(token) for token in fires_on(description, FIRES)]
    raised = [_word(token) for token in promotes(description, PROMOTES)] if "logits" in description else []
    return " → ".join([", ".join(fired), ", ".join(raised)] if raised else [", ".join(fired)]).strip()


def labels(descriptions: Mapping[tuple[int, int], Description]) -> dict[tuple[int, int], str]:
    """Labels of features that have one."""
    found = {name: label(description) for name, description in descriptions.items()}
    return {name: words for name, words in found.items() if words}


def _layer(site: str) -> int:
    found = parse_site(site)
    if found.kind != "mlp_in" or found.layer is None:
        raise ValueError(f"{site} is not what an MLP reads")
    return found.layer


def _word(token: str) -> str:
    """A token without the space before it; one of white space alone shows what it is."""
    return visible(token.strip()) if token.strip() else visible(token)

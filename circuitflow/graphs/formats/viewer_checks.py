"""Checks of what a viewer's file holds, so that a file which is not quite right ends with a sentence."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from circuitflow.errors import UserError
from circuitflow.graphs.formats.viewer import TYPES
from circuitflow.store.files import read_json

WHOLE = {
    "feature": ("layer", "ctx_idx", "feature"),
    "error": ("layer", "ctx_idx"),
    "token": ("ctx_idx",),
    "logit": ("layer", "feature"),
}
"""Whole numbers that a node of each kind has."""
REAL = {"feature": ("activation",), "error": (), "token": (), "logit": ("token_prob", "weight")}
"""Numbers that it may have."""


class Link(NamedTuple):
    """An edge of the file."""

    target: int
    source: int
    weight: float
    share: float | None


def read_checked(path: Path) -> dict[str, Any]:
    """The plain value of a viewer's JSON.

    :raises UserError: it is none.
    """
    value = read_json(path)
    parts = {"metadata": dict, "nodes": list, "links": list}
    for key, kind in parts.items():
        if not isinstance(value, dict) or not isinstance(value.get(key), kind):
            raise UserError(
                f"File {path} is no graph of a viewer: it has no {key}; name a JSON file that circuit-tracer, "
                "Neuronpedia or `circuitflow convert-graph` wrote."
            )
    tokens = value["metadata"].get("prompt_tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"Graph {path} has no metadata.prompt_tokens; export it again.")
    return value


def kind_of(path: Path, number: int, node: Any, n_pos: int) -> str:
    """The kind of a node, which has all that its kind needs.

    :raises UserError: it has not.
    """
    said = f"Graph {path}: node {number}"
    if not isinstance(node, Mapping) or "node_id" not in node:
        raise UserError(f"{said} has no node_id; export the graph again.")
    kinds = {name: kind for kind, name in TYPES.items()}
    kind = kinds.get(str(node.get("feature_type")))
    said += f" ({node['node_id']})"
    if kind is None:
        raise UserError(
            f"{said} is a node of type {node.get('feature_type')!r}; expected {', '.join(kinds)}."
        )
    for key in WHOLE[kind]:
        most = n_pos - 1 if key == "ctx_idx" else None
        if not _is_whole(node.get(key), most):
            expected = "from 0" if most is None else f"from 0 to {most}"
            raise UserError(f"{said} has {key} {node.get(key)!r}; expected a whole number {expected}.")
    for key in REAL[kind]:
        if node.get(key) is not None and not is_number(node[key]):
            raise UserError(f"{said} has {key} {node[key]!r}; expected a number.")
    return kind


def _is_whole(value: Any, most: int | None) -> bool:
    try:
        return int(value) >= 0 and (most is None or int(value) <= most)
    except (TypeError, ValueError, OverflowError):
        return False


def is_number(value: Any) -> bool:
    """Whether it is a number that can be computed with."""
    return isinstance(value, int | float) and math.isfinite(value)


def link_of(path: Path, number: int, link: Any, numbers: Mapping[str, int]) -> Link:
    """A link by the numbers of its ends.

    :raises UserError: an end is no node, or it has no weight.
    """
    if not isinstance(link, Mapping) or not is_number(link.get("weight")):
        raise UserError(
            f"Graph {path}: link {number} has no weight that is a number; export the graph again."
        )
    for end in ("target", "source"):
        if str(link.get(end)) not in numbers:
            raise UserError(f"Graph {path} has a link with {end} {link.get(end)!r}, which is no node of it.")
    share = float(link["share"]) if is_number(link.get("share")) else None
    return Link(numbers[str(link["target"])], numbers[str(link["source"])], float(link["weight"]), share)

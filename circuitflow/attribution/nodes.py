"""How tables name nodes, and which nodes of a site are the strongest."""

from collections.abc import Mapping

import numpy as np

ERROR = -1
"""Feature number of error nodes."""
REST = -2
"""Feature number, in tables of edges, of all features outside the pool together."""
METRIC = -3
"""Feature number, in tables of edges, of the metric itself."""

SUMMED = -1
"""Position of nodes that are summed over positions."""

KINDS = {ERROR: "error", REST: "rest", METRIC: "metric"}

RANKINGS = ("absolute", "signed")
"""Orders of nodes: by |score|, or by the score itself, most positive first."""


def strength(score: np.ndarray, ranking: str) -> np.ndarray:
    """What nodes are ordered by, strongest largest: |score| (``absolute``) or the score itself (``signed``)."""
    if ranking not in RANKINGS:
        raise ValueError(f"ranking is {ranking!r}; expected one of {', '.join(RANKINGS)}")
    return np.abs(score) if ranking == "absolute" else np.asarray(score)


def kinds(features: np.ndarray) -> np.ndarray:
    """Kind of node ("feature", "error", "rest") by feature number."""
    named = np.full(len(features), "feature", object)
    for number, kind in KINDS.items():
        named[features == number] = kind
    return named


def top_nodes(
    table: Mapping[str, np.ndarray], n: int, ranking: str = "absolute"
) -> tuple[np.ndarray, np.ndarray]:
    """Features and positions of the ``n`` strongest feature nodes on train and of all error nodes, in that order.

    A table of score_nodes has one error, or one per position. A site has its error even where nothing changes.
    """
    train = table["split"] == "train"
    kind, score = table["kind"], table["score"]
    features = np.flatnonzero(train & (kind == "feature"))
    order = np.lexsort(
        (table["position"][features], table["feature"][features], -strength(score[features], ranking))
    )
    rows = np.concatenate([features[order][:n], np.flatnonzero(train & (kind == "error"))])
    feature, position = table["feature"][rows], table["position"][rows]
    if not (feature == ERROR).any() and not (position >= 0).any():
        feature, position = np.append(feature, ERROR), np.append(position, SUMMED)
    return feature.astype(np.int64), position.astype(np.int64)

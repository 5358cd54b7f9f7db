"""How tables name nodes, and which nodes of a site are the strongest."""

from collections.abc import Mapping

import numpy as np

ERROR = -1
"""Feature number of error nodes."""
REST = -2
"""Feature number, in tables of edges, of all features outside the pool together."""

KINDS = {ERROR: "error", REST: "rest"}


def kinds(features: np.ndarray) -> np.ndarray:
    """Kind of node ("feature", "error", "rest") by feature number."""
    named = np.full(len(features), "feature", object)
    for number, kind in KINDS.items():
        named[features == number] = kind
    return named


def top_features(table: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """Numbers of the ``n`` features with the largest |score| on train, largest first, in a table of score_nodes.

    Equal scores are ordered by feature number.
    """
    here = (table["split"] == "train") & (table["kind"] == "feature")
    feature, score = table["feature"][here], table["score"][here]
    return feature[np.lexsort((feature, -np.abs(score)))][:n]

"""What a graph predicts of an intervention: effects along its edges, directly or through features that respond."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from circuitflow.graphs.graph import Graph


def predicted(graph: Graph, held: Mapping[int, float], up_to: int) -> Float[np.ndarray, " targets"]:
    """Change of every target's pre-activation or logit when some features are held at multiples of their activation.

    An edge is linear in its source: holding s at m times its activation adds (m − 1)·A[t, s]. Features above the
    layer ``up_to`` that are targets and not held then change in proportion, and so on down every path; which
    features are active, attention and norms stay as they are, and errors do not change.

    :param graph: its weights are the effects of whole activations.
    :param held: node numbers of features, and the multiple that each is held at.
    :param up_to: the last layer whose features do not respond; −1: all respond.
    :returns: in the order of ``graph.targets``.
    """
    share = np.zeros(graph.n_nodes)
    for node, multiple in held.items():
        share[node] = multiple - 1
    rows = np.flatnonzero(graph.targets < graph.first_error)
    nodes = graph.targets[rows]
    responds = (graph.features[nodes, 0] > up_to) & ~np.isin(nodes, list(held))
    rows, nodes = rows[responds], nodes[responds]
    weights = graph.weights.astype(np.float64)
    # Every step goes at least one layer further, so this ends.
    for _ in range(len(np.unique(graph.features[:, 0])) + 1):
        moved = weights[rows] @ share / graph.activations[nodes]
        if np.array_equal(moved, share[nodes]):
            break
        share[nodes] = moved
    return np.asarray(weights @ share)

"""How much each node of an attribution graph matters for its outputs: influence, pruning, scores.

Definitions of Ameisen et al. 2025 (Circuit Tracing), as circuit-tracer computes them. Signs do not count here: Â is
|weights| with every target's incoming effects scaled to sum to 1, and influence is p·Σ_{k≥1} Âᵏ.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from circuitflow.graphs.graph import Graph

SMALLEST = 1e-10
"""Incoming effects that sum to less count as none."""


class Scores(NamedTuple):
    """How much of the graph goes through features, 0 to 1."""

    replacement: float
    """Influence of tokens / (that of tokens and errors): how much of what enters, enters as tokens."""
    completeness: float
    """Share of what reaches nodes that comes from other nodes than errors, nodes weighted by influence."""


@dataclass(frozen=True)
class Kept:
    """What pruning leaves."""

    nodes: np.ndarray
    """(n_nodes,) bool."""
    edges: np.ndarray
    """(n_edges, 2) int64: target node, source node, in the order of their numbers."""
    weights: np.ndarray
    """(n_edges,) direct effects of these edges."""
    shares: np.ndarray
    """(n_edges,) edge scores: Â·(influence + p) in the graph of the kept nodes."""
    influence: np.ndarray
    """(n_nodes,) influence in the whole graph."""


def influence(weights: np.ndarray, targets: np.ndarray, p: np.ndarray) -> np.ndarray:
    """p·Σ_{k≥1} Âᵏ: how much of the outputs each node accounts for, through all its paths.

    :param weights: (n_t, n) effects on each target. Nodes that are no targets have no rows and end paths.
    :param targets: (n_t,) node number of each row.
    :param p: (n,) weight of each node where influence begins (probabilities of the logits).
    :raises ValueError: effects go round in a circle.
    """
    return _paths(normalised(weights), targets, np.asarray(p, dtype=np.float64))


def whole_influence(graph: Graph) -> np.ndarray:
    """(n_nodes,) influence of each node in the whole graph."""
    return influence(graph.weights, graph.targets, start(graph))


def prune(graph: Graph, node_share: float = 0.8, edge_share: float = 0.98) -> Kept:
    """The fewest nodes with this share of all influence, then the fewest edges among them with that share of theirs.

    Tokens and logits stay. Features and errors that then lead nowhere, and features that nothing reaches, go too;
    features without a row, whose causes are not known, count as reached.
    """
    p = start(graph)
    total = influence(graph.weights, graph.targets, p)
    nodes = total >= cut(total, node_share)
    nodes[graph.first_token :] = True
    rows = np.flatnonzero(nodes[graph.targets])
    columns = np.flatnonzero(nodes)
    place = np.cumsum(nodes) - 1
    weights, targets = graph.weights[np.ix_(rows, columns)], graph.targets[rows]
    share = normalised(weights)
    within = _paths(share, place[targets], p[columns]) + p[columns]
    share *= within[place[targets], None]
    kept = (share >= cut(share.ravel(), edge_share)) & (share > 0)
    _drop_loose(graph, nodes, kept, targets, columns)
    row, column = np.nonzero(kept)
    return Kept(
        nodes,
        np.stack([targets[row], columns[column]], axis=1),
        weights[row, column],
        share[row, column],
        total,
    )


def scores(graph: Graph) -> Scores:
    """Replacement and completeness of a whole graph (algorithms of Ameisen et al. 2025).

    Targets whose every incoming effect is 0 have no errors among them; nodes without rows (tokens, errors) count as
    complete, as in circuit-tracer.
    """
    p = start(graph)
    share = normalised(graph.weights)
    total = _paths(share, graph.targets, p)
    errors = slice(graph.first_error, graph.first_token)
    tokens = float(total[graph.first_token : graph.first_logit].sum())
    missed = float(total[errors].sum())
    weight = total + p
    incoming = share[:, errors].sum(axis=1)
    complete = 1.0 - float(incoming @ weight[graph.targets]) / float(weight.sum())
    return Scores(tokens / (tokens + missed) if tokens + missed else 0.0, complete)


def cut(values: np.ndarray, share: float) -> float:
    """The smallest value among the largest that make up this share of the sum."""
    falling = np.sort(values)[::-1]
    total = falling.sum()
    if not len(falling) or total <= 0:
        return 0.0
    reached = int(np.searchsorted(np.cumsum(falling) / total, share))
    return float(falling[min(reached, len(falling) - 1)])


def start(graph: Graph) -> np.ndarray:
    """(n_nodes,) p: where influence begins, at the logits with their weights."""
    p = np.zeros(graph.n_nodes)
    p[graph.first_logit :] = graph.probabilities
    return p


def normalised(weights: np.ndarray) -> np.ndarray:
    """|weights| in float64, every row scaled to sum to 1."""
    size = np.abs(weights).astype(np.float64)
    size /= np.maximum(size.sum(axis=1, keepdims=True), SMALLEST)
    return size


def _paths(share: np.ndarray, targets: np.ndarray, p: np.ndarray) -> np.ndarray:
    total, step = np.zeros_like(p), p
    for _ in range(len(p) + 1):
        step = step[targets] @ share
        if not step.any():
            return total
        total += step
    raise ValueError("effects of the graph go round in a circle")


def _drop_loose(
    graph: Graph, nodes: np.ndarray, kept: np.ndarray, targets: np.ndarray, columns: np.ndarray
) -> None:
    """Take out, in place, features and errors without an outgoing edge and targets without an incoming one."""
    while True:
        used = np.zeros(len(nodes), dtype=bool)
        used[columns] = kept.any(axis=0)
        reached = np.ones(len(nodes), dtype=bool)
        reached[targets] = kept.any(axis=1)
        loose = nodes & ~used
        loose[graph.first_token :] = False
        loose[: graph.first_error] |= (nodes & ~reached)[: graph.first_error]
        if not loose.any():
            return
        nodes &= ~loose
        kept[~nodes[targets]] = False
        kept[:, ~nodes[columns]] = False

"""Chains of features along the edges of attribution graphs, and graphs shuffled so that degrees stay."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from circuitflow.dictionaries.compiling import compiled

Pair = tuple[int, int]
"""A feature wherever it is: layer and number."""


@dataclass(frozen=True)
class Edges:
    """Edges between the features of one graph."""

    source: np.ndarray
    """(n_edges,) node numbers."""
    target: np.ndarray
    weight: np.ndarray
    """(n_edges,) direct effects."""
    features: np.ndarray
    """(n_nodes, 3): layer, position, feature."""

    def keys(self) -> np.ndarray:
        """(k, 2) layer and number of the features that have an edge."""
        used = np.union1d(self.source, self.target)
        return np.unique(self.features[used][:, [0, 2]], axis=0).reshape(-1, 2)

    def number(self, keys: np.ndarray) -> np.ndarray:
        """(n_nodes,) row of ``keys`` that each node belongs to; −1: none."""
        place = {(int(layer), int(feature)): row for row, (layer, feature) in enumerate(keys)}
        return np.array([place.get((int(a), int(b)), -1) for a, _, b in self.features], dtype=np.int64)

    def mean_weights(self, chain: Sequence[Pair]) -> list[float]:
        """Mean effect of each edge of a chain over its places in this graph."""
        found = chains(self.source, self.target, len(chain))
        names = self.features[:, [0, 2]]
        here = np.ones(len(found), dtype=bool)
        for place, pair in enumerate(chain):
            here &= (names[found[:, place]] == np.asarray(pair)).all(axis=1)
        weight = dict(
            zip(zip(self.source.tolist(), self.target.tolist(), strict=True), self.weight, strict=True)
        )
        return [
            float(np.mean([weight[int(row[step]), int(row[step + 1])] for row in found[here]]))
            for step in range(len(chain) - 1)
        ]


def chains(source: np.ndarray, target: np.ndarray, length: int) -> np.ndarray:
    """(m, length) node numbers along every way of ``length`` nodes; each of the edges is there once."""
    found = np.stack([source, target], axis=1)
    if length == 2:
        return found
    order = np.argsort(source, kind="stable")
    first = np.searchsorted(source[order], target, side="left")
    counts = np.searchsorted(source[order], target, side="right") - first
    row = np.repeat(np.arange(len(source)), counts)
    step = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.concatenate([found[row], target[order][first[row] + step][:, None]], axis=1)


def codes_of(found: np.ndarray, number: np.ndarray, keys: int) -> np.ndarray:
    """Different chains by their features, as numbers in base ``keys``, ascending; none with an unnumbered feature."""
    places = number[found]
    places = places[(places >= 0).all(axis=1)]
    code = np.zeros(len(places), dtype=np.int64)
    for column in places.T:
        code = code * keys + column
    return np.unique(code)


class Shuffled:
    """One graph whose edges are swapped on and on: a random walk over the graphs of its degrees."""

    def __init__(self, edges: Edges, seed: int) -> None:
        self._source, self._target = edges.source.copy(), edges.target.copy()
        self._layer, self._position = (np.ascontiguousarray(edges.features[:, i]) for i in (0, 1))
        self._there = np.zeros((len(edges.features),) * 2, dtype=np.bool_)
        self._there[self._source, self._target] = True
        self._random = np.random.default_rng(seed)

    def next(self, swaps: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and targets after ``swaps`` tries per edge; they are overwritten by the next call."""
        n = len(self._source)
        if n > 1:
            picks = self._random.integers(0, n, (swaps * n, 2))
            swap_targets(self._source, self._target, self._layer, self._position, self._there, picks)
        return self._source, self._target


@compiled()
def swap_targets(source, target, layer, position, there, picks):  # type: ignore[no-untyped-def]
    """Exchange the targets of pairs of edges, in place, where both new edges can be and neither is there."""
    for pick in range(len(picks)):
        i, j = picks[pick]
        a, b, c, d = source[i], target[i], source[j], target[j]
        forward = layer[a] < layer[d] and layer[c] < layer[b]
        causal = position[a] <= position[d] and position[c] <= position[b]
        if forward and causal and not there[a, d] and not there[c, b]:
            there[a, b] = there[c, d] = False
            there[a, d] = there[c, b] = True
            target[i], target[j] = d, b


@dataclass(frozen=True)
class Possible:
    """Which chains each graph's features could form."""

    possible: np.ndarray
    """(graphs, chains) bool, of the chains that were asked for."""
    pairs: np.ndarray
    """(graphs, keys, keys) bool: an edge from the first to the second feature is possible."""
    length: int

    def total(self, least: int) -> int:
        """Chains that are possible in at least ``least`` graphs."""
        pairs = self.pairs.astype(np.float32)
        if self.length == 2:
            return int((pairs.sum(axis=0) >= least).sum())
        between = range(pairs.shape[1])
        return sum(int(((pairs[:, :, b].T @ pairs[:, b, :]) >= least).sum()) for b in between)


def possible_chains(edges: Sequence[Edges], keys: np.ndarray, length: int, codes: np.ndarray) -> Possible:
    """Chains that can be made of nodes with outgoing and incoming edges, in the order of layers and positions."""
    pairs = np.stack([_possible_pairs(one, keys) for one in edges])
    at: list[np.ndarray] = []
    rest = codes.copy()
    for _ in range(length):
        rest, place = np.divmod(rest, len(keys))
        at.insert(0, place)
    possible = np.ones((len(edges), len(codes)), dtype=bool)
    for first, second in pairwise(at):
        possible &= pairs[:, first, second]
    return Possible(possible, pairs, length)


def _possible_pairs(edges: Edges, keys: np.ndarray) -> np.ndarray:
    number, position = edges.number(keys), edges.features[:, 1]
    earliest = np.full(len(keys), np.iinfo(np.int64).max)
    latest = np.full(len(keys), -1)
    for reach, bound, nodes in ((np.minimum, earliest, edges.source), (np.maximum, latest, edges.target)):
        shared = nodes[number[nodes] >= 0]
        reach.at(bound, number[shared], position[shared])
    return (earliest[:, None] <= latest[None, :]) & (keys[:, 0][:, None] < keys[:, 0][None, :])

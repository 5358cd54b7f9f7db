"""Influence while rows are still being found: which features to expand next."""

from collections.abc import Iterator

import numpy as np

from circuitflow.graphs.influence import SMALLEST

BLOCK = 64
"""Rows whose magnitudes are held at once."""


class Known:
    """Rows of a table that fills up: first those of logits, then those of features, in the order of their choice.

    Effects lead from lower to higher layers alone, so one sweep from the logits down gives the influence exactly.
    """

    def __init__(self, weights: np.ndarray, layers: np.ndarray, p: np.ndarray) -> None:
        """Begin without rows.

        :param weights: (rows, columns) the table; its first columns are features.
        :param layers: (n_features,) layer that each feature reads.
        :param p: (n_logits,) weights of the logits, whose rows come first.
        """
        self.weights, self.layers, self.p = weights, layers, p
        self.scale = np.zeros(len(weights))

    def add(self, first: int, end: int) -> None:
        """Rows from ``first`` to before ``end`` have been filled."""
        for rows in _blocks(np.arange(first, end)):
            total = np.abs(self.weights[rows]).sum(axis=1, dtype=np.float64)
            self.scale[rows] = 1.0 / np.maximum(total, SMALLEST)

    def influence(self, chosen: np.ndarray) -> np.ndarray:
        """(n_features,) influence through the rows that there are; ``chosen`` says which feature each row is of."""
        n = len(self.layers)
        found = np.zeros(n)
        self._spread(found, np.arange(len(self.p)), self.p)
        own = self.layers[chosen]
        for layer in np.unique(own)[::-1]:
            which = np.flatnonzero(own == layer)
            self._spread(found, which + len(self.p), found[chosen[which]])
        return found

    def most_influential(self, chosen: np.ndarray, count: int) -> np.ndarray:
        """The features without a row that matter most; of equal ones the first."""
        found = self.influence(chosen)
        found[chosen] = -1.0
        return np.argsort(-found, kind="stable")[:count]

    def _spread(self, found: np.ndarray, rows: np.ndarray, amounts: np.ndarray) -> None:
        for at, block in zip(range(0, len(rows), BLOCK), _blocks(rows), strict=True):
            shares = (amounts[at : at + BLOCK] * self.scale[block]).astype(self.weights.dtype)
            size = self.weights[block, : len(found)]
            found += shares @ np.abs(size, out=size)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[at : at + BLOCK] for at in range(0, len(rows), BLOCK))

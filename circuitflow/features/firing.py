"""When chosen features fire: counts, strengths, tokens and best places, gathered in one pass of any length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary

BINS_PER_OCTAVE = 2
LOWEST_BIN, HIGHEST_BIN = -40, 60  # activations of 2^-20 to 2^30; beyond, they fall into the outermost bins


@dataclass(frozen=True)
class Firing:
    """One entry per token and chosen feature that is active there, by rising token."""

    row: Int64[np.ndarray, " entries"]
    """Number of the token among those encoded."""
    place: Int64[np.ndarray, " entries"]
    """Which of the chosen features."""
    value: Float64[np.ndarray, " entries"]
    """Activation: the factor of the decoder row, in raw units; negative only in dictionaries of coordinates."""

    @property
    def size(self) -> Float64[np.ndarray, " entries"]:
        """Activations without their sign: what strength is measured by."""
        return np.abs(self.value)


def firing(
    dictionary: Dictionary,
    x: Float[Tensor, "n d_model"],
    positions: Int64[Tensor, " n"],
    chosen: Int64[Tensor, " m"],
) -> Firing:
    """Encode ``n`` vectors and keep the chosen features (all different)."""
    place = torch.full((dictionary.d_dict,), -1, dtype=torch.int64, device=x.device)
    place[chosen] = torch.arange(len(chosen), device=x.device)
    codes = dictionary.encode(x, positions).select(place >= 0)
    found = (codes.rows(), place[codes.features], codes.values.double())
    return Firing(*(part.cpu().numpy() for part in found))


class Strengths:
    """How often and how strongly each of ``m`` features fires."""

    def __init__(self, m: int) -> None:
        self.tokens = 0
        self.count = np.zeros(m, np.int64)
        self.total = np.zeros(m)
        self.largest = np.zeros(m)
        self.bins = np.zeros((m, HIGHEST_BIN - LOWEST_BIN), np.int64)

    def add(self, fired: Firing, tokens: int) -> None:
        """Count the firings among further ``tokens`` tokens."""
        self.tokens += tokens
        np.add.at(self.count, fired.place, 1)
        np.add.at(self.total, fired.place, fired.size)
        np.maximum.at(self.largest, fired.place, fired.size)
        bins = np.floor(BINS_PER_OCTAVE * np.log2(fired.size)).astype(np.int64)
        np.add.at(self.bins, (fired.place, np.clip(bins, LOWEST_BIN, HIGHEST_BIN - 1) - LOWEST_BIN), 1)

    def of(self, place: int) -> dict[str, Any]:
        """Density (share of tokens), largest and mean activation where active, and a histogram in half octaves."""
        used = np.flatnonzero(self.bins[place])
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, -1)
        edges = 2.0 ** ((np.arange(first, last + 2) + LOWEST_BIN) / BINS_PER_OCTAVE)
        return {
            "density": rounded(self.count[place] / max(self.tokens, 1)),
            "max": rounded(self.largest[place]),
            "mean_active": rounded(self.total[place] / max(self.count[place], 1)),
            "histogram": {
                "edges": [rounded(edge) for edge in edges] if len(used) else [],
                "counts": self.bins[place, first : last + 1].tolist(),
            },
        }


class TokenTally:
    """Which tokens each feature fires on: sums by feature and token, kept only for pairs that occur."""

    def __init__(self, vocabulary: int) -> None:
        self.occurrences = np.zeros(vocabulary, np.int64)
        self._keys = np.empty(0, np.int64)
        self._sums = np.empty((0, 3))  # firings, Σ activation, Σ activation²

    def add(self, fired: Firing, tokens: Int64[np.ndarray, " n"]) -> None:
        """Count the firings among further tokens, given by their ids."""
        self.occurrences += np.bincount(tokens, minlength=len(self.occurrences))
        keys = fired.place * len(self.occurrences) + tokens[fired.row]
        sums = np.stack([np.ones_like(fired.value), fired.value, fired.value**2], axis=1)
        self._keys, place = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        merged = np.zeros((len(self._keys), 3))
        np.add.at(merged, place, np.concatenate([self._sums, sums]))
        self._sums = merged

    def top(self, place: int, limit: int) -> list[dict[str, Any]]:
        """The ``limit`` tokens with the largest Σ activation²: strong firing counts more than frequent weak firing."""
        start, stop = np.searchsorted(self._keys, [place, place + 1] * np.array(len(self.occurrences)))
        order = start + np.argsort(-self._sums[start:stop, 2], kind="stable")[:limit]
        tokens = self._keys[order] - place * len(self.occurrences)
        return [
            {
                "id": int(token),
                "mean": rounded(total / n),
                "share": rounded(n / self.occurrences[token]),
                "n": int(n),
            }
            for token, (n, total, _) in zip(tokens, self._sums[order], strict=True)
        ]


class BestPlaces:
    """For each feature the tokens where it fires most, at most one per group (a document, a kind of prompt)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.place, self.group, self.row = (np.empty(0, np.int64) for _ in range(3))
        self.value = np.empty(0)

    def add(self, fired: Firing, groups: Int64[np.ndarray, " n"], first_row: int) -> None:
        """Offer further tokens: the group of each, and the number of the first among all tokens of the pass."""
        place = np.concatenate([self.place, fired.place])
        group = np.concatenate([self.group, groups[fired.row]])
        row = np.concatenate([self.row, fired.row + first_row])
        value = np.concatenate([self.value, fired.size])
        order = np.lexsort((row, -value, place))
        order = order[_first_of(place[order], group[order])]
        order = order[_rank_within(place[order]) < self.limit]
        self.place, self.group, self.row, self.value = place[order], group[order], row[order], value[order]

    def of(self, place: int) -> Sequence[int]:
        """Token numbers, the strongest first."""
        return [int(row) for row in self.row[self.place == place]]


def _first_of(place: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Indices of the first entry of every (place, group), in the order of the entries."""
    if not len(place):
        return np.empty(0, np.int64)
    _, first = np.unique(np.stack([place, group]), axis=1, return_index=True)
    return np.sort(first)


def _rank_within(place: np.ndarray) -> np.ndarray:
    """Number of each entry among those of its place; equal places lie together."""
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    return np.arange(len(place)) - np.repeat(starts, np.diff(starts, append=len(place)))


def rounded(value: float, digits: int = 5) -> float:
    """A number in so many significant digits: what a reader needs, and short files."""
    return float(f"{value:.{digits}g}")

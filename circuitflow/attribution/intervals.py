"""Bootstrap intervals, and correlations of ranks: the statistics that ranking and comparing nodes share."""

import numpy as np

INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap that every ``low`` and ``high`` is."""


def interval(
    draws: np.ndarray, estimate: float, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float, float]:
    """The percentile interval of resamples, moved so that their median lies on the estimate, cut to ``bounds``.

    A resample is noisier than the sample, so that resampled correlations and overlaps with a fixed list lie below the
    estimate (sums of absolute values above it), often all of them. The move takes this bias out, and the interval
    always holds the estimate. NaN where a resample or the estimate is NaN.
    """
    low, middle, high = np.percentile(draws, [INTERVAL[0], 50, INTERVAL[1]])
    shift = estimate - middle
    return float(np.clip(low + shift, *bounds)), float(np.clip(high + shift, *bounds))


def rank_correlation(fixed: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's correlation of one list (n,) with each of several (m, n); ties share a rank, constants give NaN."""
    return np.array([correlation(ranks(fixed), ranks(other)) for other in others])


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two lists; NaN if one is constant."""
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / size if size > 0 else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value from 1, the mean of their ranks for equal values."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place])


def falling(strengths: np.ndarray) -> np.ndarray:
    """Indices from the largest value down, along the last axis; ties in the order given."""
    return np.argsort(-strengths, axis=-1, kind="stable")


def overlap(top: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Share of the nodes ``top`` (k,) among the first k of each order (…, n)."""
    return np.asarray(np.isin(order[..., : len(top)], top).mean(-1))

"""Faithfulness from the metric of single prompts, with intervals."""

from collections.abc import Sequence

import numpy as np

from circuitflow.attribution.intervals import INTERVAL

Numbers = np.ndarray | np.floating


def faithfulness(circuit: np.ndarray, empty: np.ndarray, full: np.ndarray, aggregate: str) -> np.ndarray:
    """F from the metric of each prompt; NaN where emptying the circuit changes nothing.

    :param circuit: m(C), (…, n) with any leading axes; ``empty``, m(∅), and ``full``, m(M), broadcast against it.
    :param aggregate: how the n prompts are averaged: "ratio_of_means" or "mean_of_ratios".
    """
    if aggregate == "mean_of_ratios":
        return np.asarray(_ratio(circuit - empty, full - empty).mean(-1))
    return _ratio((circuit - empty).mean(-1), (full - empty).mean(-1))


def bootstrap(
    circuit: np.ndarray, empty: np.ndarray, full: np.ndarray, aggregate: str, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of F over resampled prompts: the same prompts for C, ∅ and M, and for every circuit.

    :param circuit: (circuits, n); the others (n,).
    """
    drawn = resampled(circuit, empty, full, aggregate, draws, seed)
    low, high = (np.percentile(drawn, bound, axis=1) for bound in INTERVAL)
    return low, high


def resampled(
    circuit: np.ndarray, empty: np.ndarray, full: np.ndarray, aggregate: str, draws: int, seed: int
) -> np.ndarray:
    """F of every circuit on resampled prompts, (circuits, draws): the same prompts in every row.

    Rows of one seed and number of prompts are paired, also between calls.

    :param circuit: (circuits, n); the others (n,).
    """
    n = len(empty)
    index = np.random.default_rng(seed).integers(0, n, (draws, n))
    rows = [faithfulness(one[index], empty[index], full[index], aggregate) for one in circuit]
    return np.array(rows).reshape(len(circuit), draws)


def areas(shares: np.ndarray, F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CPR and CMD of a curve of circuits: the areas under F and under |1 − F| over the share of nodes kept.

    Trapezoids over the linear share, as in the mechanistic interpretability benchmark (Mueller et al. 2025): a large
    circuit performance ratio (CPR) is good, and so is a small circuit-model distance (CMD). Not divided by the span.

    :param shares: (circuits,), rising; :param F: (circuits, …).
    """
    width = np.diff(shares).reshape(-1, *[1] * (F.ndim - 1))

    def area(height: np.ndarray) -> np.ndarray:
        return np.asarray((width * (height[1:] + height[:-1]) / 2).sum(0))

    return area(F), area(np.abs(1 - F))


def outlying(values: np.ndarray) -> np.ndarray:
    """Which values lie more than 1.5 interquartile ranges outside the quartiles (Tukey), or are no numbers."""
    low, high = np.nanpercentile(values, (25, 75)) if np.isfinite(values).any() else (0.0, 0.0)
    reach = 1.5 * (high - low)
    return np.asarray(~((values >= low - reach) & (values <= high + reach)))


def spread_over_cases(cases: Sequence[str], n: int) -> list[int]:
    """``n`` prompts (all, if there are fewer), taken from the cases in turn, in their order."""
    turn: dict[str, int] = {}
    keys = []
    for index, case in enumerate(cases):
        keys.append((turn.get(case, 0), case, index))
        turn[case] = turn.get(case, 0) + 1
    return sorted(index for _, _, index in sorted(keys)[:n])


def _ratio(numerator: Numbers, denominator: Numbers) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)

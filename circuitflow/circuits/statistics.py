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
    n = len(empty)
    index = np.random.default_rng(seed).integers(0, n, (draws, n))
    low_high = [
        np.percentile(faithfulness(one[index], empty[index], full[index], aggregate), INTERVAL)
        for one in circuit
    ]
    low, high = np.array(low_high).reshape(-1, 2).T
    return low, high


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

"""A budgeted sample of many nodes or edges, and what it tells of the sum of their effects: stratified by their scores.

Scores are known for all, true effects only for the sample. Errors and the strongest are all measured, the middle and
the rest at random. Σ|effect| of a stratum is its size times the sample's mean; strata add up (Cochran 1977, ch. 5).
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

NAMES = ("error", "top", "middle", "random")
"""Strata from the surest to the least: error nodes, the strongest, those with most of the rest, all others."""

CONVENTIONS = {
    "error": "error nodes, all measured",
    "top": "the strongest by |score|, all measured",
    "middle": "the next, which with those before hold the given share of the summed |score|: a random sample",
    "random": "all others: a random sample",
    "estimate": "of the sum of |effect|: size of each stratum x mean |effect| in its sample",
    "upper": "one-sided bound of that sum: Student's t with the estimate's degrees of freedom (Satterthwaite), "
    "corrected for skewness (Hall 1983), plus the unseen that may exceed each sample's largest (at most 1 - "
    ".05^(1/n) of a "
    "stratum), taken at that size; approximate, for the pairs of the audit",
    "beyond": "units outside with |effect| above the threshold, the weakest |effect| measured in the "
    "circuit; its bound is exact (Clopper-Pearson per stratum, "
    "Bonferroni)",
}


@dataclass(frozen=True)
class Sample:
    """Which of ``n`` units are measured."""

    stratum: np.ndarray
    """(n,) number of the unit's stratum in :data:`NAMES`."""
    chosen: np.ndarray
    """Indices of the measured units, ascending."""

    def size(self, stratum: int) -> int:
        """Units of a stratum."""
        return int((self.stratum == stratum).sum())

    def within(self, stratum: int) -> np.ndarray:
        """Which of the measured units belong to a stratum."""
        return np.asarray(self.stratum[self.chosen] == stratum)


def sample(
    sizes: np.ndarray, errors: np.ndarray, budget: int, middle: float, generator: np.random.Generator
) -> Sample:
    """Choose the errors and up to ``budget`` other units: a third the largest, a third the middle, a third the rest.

    What one stratum does not use the next may.

    :param sizes: (n,) |score| of every unit; ``errors`` (n,) which are error nodes.
    :param middle: share of the other units' summed size that top and middle hold.
    """
    stratum = np.full(len(sizes), NAMES.index("random"))
    stratum[errors] = NAMES.index("error")
    others = np.flatnonzero(~errors)
    order = others[np.argsort(-sizes[others], kind="stable")]
    top = order[: -(-budget // 3)]
    reached = np.cumsum(sizes[order])
    whole = reached[-1] if len(reached) else 0.0
    until = int(np.searchsorted(reached, middle * whole)) + 1 if whole > 0 else 0
    stratum[order[:until]] = NAMES.index("middle")
    stratum[top] = NAMES.index("top")
    left = budget - len(top)
    middles, rest = (np.flatnonzero(stratum == NAMES.index(name)) for name in ("middle", "random"))
    half = min(len(middles), max(-(-left // 2), left - len(rest)))
    chosen = [np.flatnonzero(errors), top, generator.permutation(middles)[:half]]
    chosen.append(generator.permutation(rest)[: max(left - half, 0)])
    return Sample(stratum, np.sort(np.concatenate(chosen)).astype(np.int64))


@dataclass(frozen=True)
class Estimate:
    """A sum of which a sample is known."""

    value: float
    upper: float
    """One-sided bound at the confidence asked for."""
    measured: float
    """What the sample itself adds up to."""


def estimate_sum(drawn: Sample, effects: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Σ|effect| of all units from the measured ones.

    :param effects: of the measured units, in the order of ``drawn.chosen``; their sizes count.
    """
    sizes = np.abs(effects)
    total = variance = third = freedom = allowance = 0.0
    for number in range(len(NAMES)):
        whole, here = drawn.size(number), sizes[drawn.within(number)]
        if not len(here):
            if whole:
                return Estimate(float("nan"), float("inf"), float(sizes.sum()))
            continue
        total += whole * float(here.mean())
        n, unseen = len(here), 1 - len(here) / whole
        if not unseen:
            continue
        allowance += whole * unseen * (1 - (1 - confidence) ** (1 / n)) * float(here.max())
        if n < 2:
            return Estimate(float("nan"), float("inf"), float(sizes.sum()))
        part = whole**2 * unseen * float(here.var(ddof=1)) / n
        variance += part
        freedom += part**2 / (n - 1)
        third += (whole * unseen**0.5) ** 3 * float(((here - here.mean()) ** 3).mean()) / n**2
    if variance == 0:
        return Estimate(total, total + allowance, float(sizes.sum()))
    t, skewness = float(stats.t.ppf(confidence, variance**2 / freedom)), third / variance**1.5
    upper = total + variance**0.5 * (t + skewness * (1 + 2 * t**2) / 6)
    return Estimate(total, max(upper, total) + allowance, float(sizes.sum()))


def most_beyond(drawn: Sample, effects: np.ndarray, threshold: float, confidence: float = 0.95) -> int:
    """So many of all units, at most, have |effect| > ``threshold``, with the given confidence; assumes nothing else."""
    sampled = [number for number in range(len(NAMES)) if drawn.size(number) > drawn.within(number).sum()]
    risk = (1 - confidence) / max(1, len(sampled))
    found = 0
    for number in range(len(NAMES)):
        here = np.abs(effects[drawn.within(number)]) > threshold
        n, hits, whole = len(here), int(here.sum()), drawn.size(number)
        if n == whole:
            found += hits
        elif hits == n:
            found += whole
        else:
            found += max(hits, int(np.floor(whole * stats.beta.ppf(1 - risk, hits + 1, n - hits))))
    return found


def resampled(effects: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Means (draws, units) of effects (pairs, units) over resampled pairs."""
    n = len(effects)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    return np.asarray(counts @ effects / n)

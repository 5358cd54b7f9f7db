"""The rules by which nodes and edges are chosen from their strengths."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from circuitflow.errors import UserError, nearest

ROUNDING = 1e-12
"""Relative slack of sums and products that stand for whole numbers or for a whole."""


def chosen(
    strengths: Sequence[float] | np.ndarray, rule: Mapping[str, Any], total: int | None = None
) -> list[int]:
    """Indices of the candidates that a rule keeps, the strongest first, ties in the order given.

    ``strengths`` are those of ``attribution.nodes.strength``: |score| or the signed score; no sign is dropped here.
    ``rule`` has one key:

    ==============  ==================================================================================================
    top: n          the ``n`` strongest; of equals at the edge, those given first
    threshold: t    strength above ``t``
    percentile: p   strength of at least the candidates' p-th percentile (0 … 100, linear between candidates): 0 keeps
                    all, 100 those as strong as the strongest
    sparsity: s     the strongest such that a share of at least ``s`` (0 … 1) of ``total`` is left out
    zscore: z       strength above mean + z · standard deviation of the candidates (deviation over n, not n − 1);
                    nothing if all are equally strong
    effect_share: e the fewest strongest whose summed strength reaches ``e`` (0 … 1) of the sum of all positive
                    strengths; others are never kept
    ==============  ==================================================================================================

    :param total: how many nodes or edges there are in all, those included that are no candidates because they never
        have an effect; ``sparsity`` needs it.
    :raises UserError: not one known key, a value out of its range, a strength that is not a number.
    """
    name, value = _parsed(rule)
    values = np.asarray(strengths, np.float64).reshape(-1)
    if np.isnan(values).any():
        raise UserError(
            f"{int(np.isnan(values).sum())} of {len(values)} candidates have no strength (NaN), so '{name}' cannot "
            "choose among them; run the stage that scores them again."
        )
    order = np.argsort(-values, kind="stable")
    if name == "sparsity":
        return order[: _left_in(value, total, len(values))].tolist()
    return order[: COUNTS[name](values[order], value)].tolist() if len(values) else []


def _top(falling: np.ndarray, n: float) -> int:
    return int(n)


def _threshold(falling: np.ndarray, least: float) -> int:
    return int((falling > least).sum())


def _percentile(falling: np.ndarray, percentile: float) -> int:
    return int((falling >= np.percentile(falling, percentile)).sum())


def _zscore(falling: np.ndarray, z: float) -> int:
    if falling[0] == falling[-1]:
        return 0
    return int((falling > falling.mean() + z * falling.std()).sum())


def _effect_share(falling: np.ndarray, share: float) -> int:
    positive = falling[falling > 0]
    if not len(positive) or share == 0:
        return 0
    reached = np.cumsum(positive)
    return int(np.searchsorted(reached, share * reached[-1] * (1 - ROUNDING))) + 1


COUNTS: dict[str, Callable[[np.ndarray, float], int]] = {
    "top": _top,
    "threshold": _threshold,
    "percentile": _percentile,
    "zscore": _zscore,
    "effect_share": _effect_share,
}
"""How many of the candidates, given in falling order and at least one, a rule keeps."""

RANGES = {
    "top": (0, np.inf),
    "threshold": (-np.inf, np.inf),
    "percentile": (0, 100),
    "sparsity": (0, 1),
    "zscore": (-np.inf, np.inf),
    "effect_share": (0, 1),
}
RULES = tuple(RANGES)


def _parsed(rule: Mapping[str, Any]) -> tuple[str, float]:
    if len(rule) != 1:
        given = ", ".join(map(str, rule)) or "none"
        raise UserError(
            f"A selection has exactly one of {', '.join(RULES)}, but {given} were given; keep one."
        )
    ((name, value),) = rule.items()
    if name not in RANGES:
        raise UserError(f"Selection '{name}' is unknown: {nearest(name, RULES)}.")
    low, high = RANGES[name]
    if not low <= value <= high:
        raise UserError(f"Selection {name}: {value} is out of range; give a number from {low} to {high}.")
    return name, value


def _left_in(sparsity: float, total: int | None, candidates: int) -> int:
    if total is None or total < candidates:
        raise UserError(
            f"Selection sparsity is a share of all nodes or edges, but their number is given as {total} beside "
            f"{candidates} candidates; give all of them or choose by percentile."
        )
    return int((1 - sparsity) * total * (1 + ROUNDING))

"""How far two dictionaries trained from different seeds have found the same features."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from circuitflow.dictionaries.geometry import ENTRIES, nearest_rows, unit_rows

PARTNER = 0.9
"""A feature has a partner when the largest cosine with a row of the other dictionary is larger than this."""

LARGEST_EXACT = 8192
"""Up to this many rows on both sides the best matching is found exactly (half a gigabyte, seconds)."""

CANDIDATES = 16
"""Nearest rows among which the greedy matching of larger dictionaries looks for partners."""

PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Matching:
    """Pairs of rows, each row in at most one."""

    cosine: Float64[np.ndarray, " pairs"]
    method: str
    """"hungarian": the largest possible sum of cosines; "greedy": the nearest pair first."""


def agreement(
    a: Float[Tensor, "n d_model"], b: Float[Tensor, "m d_model"], seed: int
) -> dict[str, float | str]:
    """Columns of one row of the table ``seeds`` about the decoder rows of active features; NaN if a side has none.

    :param seed: of the shuffle that ``chance`` is measured with.
    """
    there, back = _largest(a, b), _largest(b, a)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(b.shape[1])).to(b.device)
    matched, fewer = matching(a, b), min(a.shape[0], b.shape[0])
    spread = np.percentile(there, PERCENTILES) if there.size else [np.nan] * len(PERCENTILES)
    return {
        "mean_max_cosine_ab": _mean(there),
        "mean_max_cosine_ba": _mean(back),
        "partner_share_ab": _share(there),
        "partner_share_ba": _share(back),
        "matched_mean": _mean(matched.cosine),
        "matched_share": float((matched.cosine > PARTNER).sum()) / fewer if fewer else float("nan"),
        "matching": matched.method,
        "chance": _mean(_largest(a, b[:, order])),
        **{f"cosine_p{q:02}": float(value) for q, value in zip(PERCENTILES, spread, strict=True)},
    }


def matching(a: Float[Tensor, "n d_model"], b: Float[Tensor, "m d_model"]) -> Matching:
    """One-to-one pairs of rows by cosine; every row of the shorter list has a partner where the matching is exact."""
    if max(a.shape[0], b.shape[0]) <= LARGEST_EXACT:
        cosine = (unit_rows(a) @ unit_rows(b).T).double().cpu().numpy()
        return Matching(cosine[linear_sum_assignment(cosine, maximize=True)], "hungarian")
    return Matching(_greedy(*_candidates(a, b)), "greedy")


def _candidates(a: Tensor, b: Tensor) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], np.ndarray]:
    """Rows of ``a``, rows of ``b`` and cosines of pairs that come into question, the nearest first."""
    unit, others = unit_rows(a), unit_rows(b)
    step = max(1, ENTRIES // max(1, others.shape[0]))
    k = min(CANDIDATES, others.shape[0])
    parts = [(unit[start : start + step] @ others.T).topk(k, dim=1) for start in range(0, len(unit), step)]
    partner = torch.cat([part.indices for part in parts]).cpu().numpy()
    cosine = torch.cat([part.values for part in parts]).double().cpu().numpy()
    row = np.repeat(np.arange(len(unit)), k)
    order = np.lexsort((partner.ravel(), row, -cosine.ravel()))
    return row[order], partner.ravel()[order], cosine.ravel()[order]


def _greedy(row: np.ndarray, partner: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Cosines of the pairs taken; rows whose candidates are all taken stay without a partner."""
    gone_a: set[int] = set()
    gone_b: set[int] = set()
    taken = []
    for left, right, value in zip(row.tolist(), partner.tolist(), cosine.tolist(), strict=True):
        if left not in gone_a and right not in gone_b:
            gone_a.add(left)
            gone_b.add(right)
            taken.append(value)
    return np.array(taken)


def _largest(a: Tensor, b: Tensor) -> Float64[np.ndarray, " known"]:
    """Largest cosine of each row of ``a`` that has a direction with a row of ``b``."""
    cosine = nearest_rows(a, b).cosine
    return cosine[~cosine.isnan()].double().cpu().numpy()


def _mean(cosines: np.ndarray) -> float:
    return float(cosines.mean()) if cosines.size else float("nan")


def _share(cosines: np.ndarray) -> float:
    return float((cosines > PARTNER).mean()) if cosines.size else float("nan")

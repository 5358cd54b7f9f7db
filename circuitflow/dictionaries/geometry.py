"""Directions of features: cosines between rows of weights, a block of rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

ENTRIES = 1 << 24  # cosines held at once (64 MiB in float32)


@dataclass(frozen=True)
class Nearest:
    """For each of ``n`` rows the row of another list whose cosine with it is largest."""

    cosine: Float[Tensor, " n"]
    """NaN for a row of norm 0, or if there is no other row."""
    index: Int64[Tensor, " n"]
    """−1 where the cosine is NaN."""


def unit_rows(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """Rows of norm 1; rows of norm 0 stay 0."""
    norms = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1)


def paired_cosines(a: Float[Tensor, "n d_model"], b: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
    """Cosine of each row of ``a`` with the same row of ``b``; NaN where one of them is 0."""
    cosine = (unit_rows(a) * unit_rows(b)).sum(dim=1).clamp(-1, 1)
    return torch.where((a != 0).any(dim=1) & (b != 0).any(dim=1), cosine, torch.nan)


def nearest_rows(rows: Float[Tensor, "n d_model"], others: Float[Tensor, "m d_model"]) -> Nearest:
    """The nearest of ``others`` to each row, the first of equally near ones. Rows of norm 0 are no neighbours."""
    lists = unit_rows(rows), unit_rows(others)
    found = [_largest(cosines) for _, cosines in _cosines(*lists, _missing(lists[1]))]
    return _nearest(found, _missing(lists[0]))


def own_cosines(rows: Float[Tensor, "n d_model"]) -> tuple[Nearest, float]:
    """The nearest other row to each row, and the mean |cosine| over all pairs of different rows of norm above 0.

    The mean is NaN for fewer than two such rows. Rows of random directions have a mean near √(2 / (π·d_model)).
    """
    unit = unit_rows(rows)
    missing = _missing(unit)
    found, total = [], 0.0
    for start, cosines in _cosines(unit, unit):
        own = torch.arange(cosines.shape[0], device=rows.device)
        cosines[own, own + start] = 0
        total += float(cosines.abs().sum(dim=1, dtype=torch.float64).sum())
        cosines[own, own + start] = -torch.inf
        cosines.masked_fill_(missing, -torch.inf)
        found.append(_largest(cosines))
    n = int((~missing).sum())
    return _nearest(found, missing), total / (n * (n - 1)) if n > 1 else float("nan")


def nearest_several(
    rows: Float[Tensor, "n d_model"], k: int
) -> tuple[Int64[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The ``k`` nearest rows to each row among all of them, itself first, and their cosines, falling.

    Neighbours are exact, so that the same rows give the same graph.
    """
    unit = unit_rows(rows)
    indices, values = [], []
    for start, cosines in _cosines(unit, unit):
        own = torch.arange(cosines.shape[0], device=rows.device)
        cosines[own, own + start] = 2.0  # itself comes first, whatever rounding and equal rows make of it
        top = cosines.topk(k, dim=1)
        indices.append(top.indices)
        values.append(top.values.clamp(-1, 1))
    return torch.cat(indices), torch.cat(values)


def _cosines(
    unit: Float[Tensor, "n d_model"], others: Float[Tensor, "m d_model"], missing: Tensor | None = None
) -> Iterator[tuple[int, Float[Tensor, "rows m"]]]:
    """First row and cosines of a block of rows; those with ``missing`` others are −∞."""
    step = max(1, ENTRIES // max(1, others.shape[0]))
    for start in range(0, unit.shape[0], step):
        cosines = unit[start : start + step] @ others.T
        yield start, cosines if missing is None else cosines.masked_fill_(missing, -torch.inf)


def _missing(rows: Tensor) -> Tensor:
    return (rows == 0).all(dim=1)


def _largest(cosines: Float[Tensor, "rows m"]) -> tuple[Tensor, Tensor]:
    """Value and place of the largest cosine of each row, the first of several equal ones."""
    if not cosines.shape[1]:
        return cosines.new_full((cosines.shape[0],), -torch.inf), cosines.new_zeros(cosines.shape[0]).long()
    largest = cosines.max(dim=1)
    return largest.values, largest.indices


def _nearest(found: list[tuple[Tensor, Tensor]], missing: Tensor) -> Nearest:
    if not found:
        return Nearest(torch.empty(0), torch.empty(0, dtype=torch.int64))
    value, place = (torch.cat(parts) for parts in zip(*found, strict=True))
    none = missing | torch.isneginf(value)
    return Nearest(
        torch.where(none, torch.nan, value.clamp(-1, 1)), torch.where(none, torch.full_like(place, -1), place)
    )

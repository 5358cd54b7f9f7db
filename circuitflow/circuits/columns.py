"""What tables of evaluations have in common: columns under each other, and both ways of averaging prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

AGGREGATES = ("ratio_of_means", "mean_of_ratios")
Columns = dict[str, list[Any] | np.ndarray]


def ordered(first: str) -> list[str]:
    """Both ways of averaging, the wanted one first."""
    return [first, *(name for name in AGGREGATES if name != first)]


def stacked(parts: Sequence[Columns]) -> Columns:
    """Tables of the same columns, one under the other; empty ones are passed over."""
    some = [part for part in parts if part]
    return {name: [value for part in some for value in part[name]] for name in some[0]} if some else {}

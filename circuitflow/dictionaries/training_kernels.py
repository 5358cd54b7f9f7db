"""Compiled loops that only training needs, beside those of :mod:`~circuitflow.dictionaries.kernels`."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.compiling import Array, as_array, compiled


def keep_largest(codes: Codes, n: int) -> Codes:
    """The ``n`` largest of all entries, of equal ones the first; there are at least ``n`` ≥ 1."""
    values = as_array(codes.values)
    smallest = np.partition(values, len(values) - n)[len(values) - n]
    offsets, features, kept = (
        np.empty(codes.n + 1, np.int64),
        np.empty(n, np.int64),
        np.empty(n, values.dtype),
    )
    _keep_largest(
        as_array(codes.offsets), as_array(codes.features), values, smallest, offsets, features, kept
    )
    return Codes(torch.from_numpy(offsets), torch.from_numpy(features), torch.from_numpy(kept), codes.d_dict)


def by_feature_with(
    codes: Codes, other: Float[Tensor, " nnz"]
) -> tuple[Codes, Codes, Float[Tensor, " d_dict"]]:
    """The transpose, the transpose with other values, and the sum of these other values over each feature."""
    values, others = np.empty_like(as_array(codes.values)), np.empty_like(as_array(codes.values))
    rows, offsets = np.empty(codes.nnz, np.int64), np.empty(codes.d_dict + 1, np.int64)
    sums = np.empty(codes.d_dict, values.dtype)
    given = (as_array(codes.offsets), as_array(codes.features), as_array(codes.values), as_array(other))
    _transpose(*given, offsets, rows, values, others, sums)
    transposed = Codes(torch.from_numpy(offsets), torch.from_numpy(rows), torch.from_numpy(values), codes.n)
    return transposed, transposed.with_values(torch.from_numpy(others)), torch.from_numpy(sums)


@compiled()
def _keep_largest(
    offsets: Array, features: Array, values: Array, smallest: float,
    new_offsets: Array, new_features: Array, new_values: Array,
) -> None:  # fmt: skip
    ties = len(new_values)
    for entry in range(len(values)):
        ties -= values[entry] > smallest
    written, new_offsets[0] = 0, 0
    for r in range(len(offsets) - 1):
        for entry in range(offsets[r], offsets[r + 1]):
            tie = values[entry] == smallest
            if values[entry] > smallest or (tie and ties > 0):
                ties -= tie
                new_features[written] = features[entry]
                new_values[written] = values[entry]
                written += 1
        new_offsets[r + 1] = written


@compiled()
def _transpose(
    offsets: Array, features: Array, values: Array, other: Array,
    new_offsets: Array, new_rows: Array, new_values: Array, new_other: Array, sums: Array,
) -> None:  # fmt: skip
    new_offsets[:], sums[:] = 0, 0
    for entry in range(len(features)):
        new_offsets[features[entry] + 1] += 1
        sums[features[entry]] += other[entry]
    for feature in range(len(sums)):
        new_offsets[feature + 1] += new_offsets[feature]
    free = new_offsets[:-1].copy()
    for r in range(len(offsets) - 1):
        for entry in range(offsets[r], offsets[r + 1]):
            place = free[features[entry]]
            free[features[entry]] += 1
            new_rows[place] = r
            new_values[place] = values[entry]
            new_other[place] = other[entry]

"""Sparse codes: the active features of a list of vectors, as indices and values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """Active features of ``n`` vectors in compressed rows, features ascending within a row.

    Entries ``offsets[i]:offsets[i + 1]`` belong to vector ``i``. A feature without an entry has the value 0.
    """

    offsets: Int64[Tensor, " n_plus_1"]
    features: Int64[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]
    d_dict: int

    @property
    def n(self) -> int:
        """Number of vectors."""
        return self.offsets.shape[0] - 1

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.features.shape[0]

    def counts(self) -> Int64[Tensor, " n"]:
        """Active features per vector (its L0)."""
        return self.offsets.diff()

    def fired(self) -> Bool[Tensor, " d_dict"]:
        """Features with an entry in any vector."""
        found = torch.zeros(self.d_dict, dtype=torch.bool, device=self.features.device)
        found[self.features] = True
        return found

    def rows(self) -> Int64[Tensor, " nnz"]:
        """The vector that each entry belongs to."""
        index = torch.arange(self.n, device=self.offsets.device)
        return torch.repeat_interleave(index, self.counts(), output_size=self.nnz)

    def where(self, keep: Bool[Tensor, " nnz"]) -> "Codes":
        """Only the entries to keep; the number of vectors stays."""
        before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
        return Codes(before[self.offsets], self.features[keep], self.values[keep], self.d_dict)

    def select(self, kept_features: Bool[Tensor, " d_dict"]) -> "Codes":
        """Only the entries of the features to keep; feature numbers stay."""
        return self.where(kept_features[self.features])

    def with_values(self, values: Float[Tensor, " nnz"]) -> "Codes":
        """The same entries with other values (gradients, differences from a mean …)."""
        return replace(self, values=values)

    def take(self, index: Int64[Tensor, " m"]) -> "Codes":
        """The codes of vectors ``index``, in that order; a vector may be taken more than once."""
        counts = self.counts()[index]
        offsets = _offsets(counts)
        shift = torch.repeat_interleave(
            self.offsets[index] - offsets[:-1], counts, output_size=int(offsets[-1])
        )
        entry = shift + torch.arange(shift.shape[0], device=shift.device)
        return Codes(offsets, self.features[entry], self.values[entry], self.d_dict)

    def columns(self, features: Int64[Tensor, " m"]) -> Float[Tensor, "n m"]:
        """Dense values of a few features (all different), 0 where inactive."""
        place = torch.full((self.d_dict,), -1, dtype=torch.int64, device=features.device)
        place[features] = torch.arange(features.shape[0], device=features.device)
        column = place[self.features]
        wanted = column >= 0
        out = self.values.new_zeros(self.n, features.shape[0])
        out[self.rows()[wanted], column[wanted]] = self.values[wanted]
        return out

    def dense(self) -> Float[Tensor, "n d_dict"]:
        """All values, zeros included: for tests and small inputs."""
        out = self.values.new_zeros(self.n, self.d_dict)
        out[self.rows(), self.features] = self.values
        return out

    def by_feature(self) -> "Codes":
        """The transpose: "vectors" are features, "features" are vector numbers, ascending."""
        return self.by_feature_with(self.values)[0]

    def by_feature_with(self, other: Float[Tensor, " nnz"]) -> tuple["Codes", "Codes"]:
        """The transpose, and the transpose of the same entries with other values."""
        order = torch.argsort(self.features, stable=True)
        offsets = _offsets(torch.bincount(self.features, minlength=self.d_dict))
        transposed = Codes(offsets, self.rows()[order], self.values[order], self.n)
        return transposed, transposed.with_values(other[order])

    def to(self, target: torch.device | str | torch.dtype) -> "Codes":
        """The codes on another device, or with values of another dtype."""
        values = self.values.to(target)
        if isinstance(target, torch.dtype):
            return self.with_values(values)
        return Codes(self.offsets.to(target), self.features.to(target), values, self.d_dict)


def empty_codes(n: int, d_dict: int, like: Tensor) -> Codes:
    """``n`` vectors without an active feature; dtype and device of ``like``."""
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=like.device)
    return Codes(offsets, offsets.new_empty(0), like.new_empty(0), d_dict)


def codes_from_dense(values: Float[Tensor, "n d_dict"]) -> Codes:
    """The non-zero entries of a dense matrix."""
    rows, features = values.nonzero(as_tuple=True)
    offsets = _offsets(torch.bincount(rows, minlength=values.shape[0]))
    return Codes(offsets, features, values[rows, features], values.shape[1])


def codes_from_lists(features: Int64[Tensor, "n k"], values: Float[Tensor, "n k"], d_dict: int) -> Codes:
    """Codes from ``k`` candidates per vector in any order; those whose value is not positive are left out."""
    n, k = features.shape
    features, order = features.sort(dim=1)
    values = values.gather(1, order)
    offsets = torch.arange(0, n * k + 1, k, device=features.device)
    codes = Codes(offsets, features.reshape(-1), values.reshape(-1), d_dict)
    active = codes.values > 0
    return codes if bool(active.all()) else codes.where(active)


def concatenate_codes(parts: Sequence[Codes]) -> Codes:
    """The vectors of all parts, one after the other."""
    counts = torch.cat([part.counts() for part in parts])
    features = torch.cat([part.features for part in parts])
    return Codes(_offsets(counts), features, torch.cat([part.values for part in parts]), parts[0].d_dict)


def decode_codes(codes: Codes, directions: Float[Tensor, "d_dict d_model"]) -> Float[Tensor, "n d_model"]:
    """Σ_i value_i · directions_i for every vector, reading only the rows of active features."""
    if codes.nnz == 0:
        return directions.new_zeros(codes.n, directions.shape[1])
    return torch.nn.functional.embedding_bag(
        codes.features,
        directions,
        codes.offsets,
        mode="sum",
        per_sample_weights=codes.values,
        include_last_offset=True,
    )


def _offsets(counts: Int64[Tensor, " n"]) -> Int64[Tensor, " n_plus_1"]:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))

"""Two operations on flat entries: products with a few rows of a matrix, and sums by key."""

import warnings

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.selection import is_compiled


def products(
    entries: Codes, vectors: Float[Tensor, "n d_model"], directions: Float[Tensor, "d_dict d_model"]
) -> Float[Tensor, " nnz"]:
    """vectors[row]·directions[feature] for every entry, whatever its value; no gathered rows, no dense product."""
    if entries.nnz == 0:
        return vectors.new_empty(0)
    if is_compiled(vectors, entries.n * entries.d_dict) and directions.dtype == vectors.dtype:
        from circuitflow.dictionaries import kernels

        return kernels.products(entries.with_values(vectors.new_empty(entries.nnz)), directions, vectors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            entries.offsets,
            entries.features,
            vectors.new_zeros(entries.nnz),
            size=(entries.n, entries.d_dict),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, vectors, directions.T, beta=0.0).values()


def sum_by(
    keys: Int64[Tensor, " entries"], values: Float[Tensor, " entries"]
) -> tuple[Int64[Tensor, " groups"], Float[Tensor, " groups"]]:
    """Sums of the values that share a key, and the keys, ascending."""
    groups, place = torch.unique(keys, return_inverse=True)
    return groups, values.new_zeros(groups.shape[0]).index_add_(0, place, values)

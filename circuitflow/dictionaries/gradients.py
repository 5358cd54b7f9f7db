"""Forward and backward of a sparse dictionary, written out: the cost of a step is one dense product plus sparse work.

Only the encoder needs dense pre-activations, and these are made a block of rows at a time in one buffer: a large
(batch, d_dict) tensor never exists. Everything after reads the rows of active features: decoding and both weight
gradients are weighted sums of rows (``embedding_bag``), each computed by one thread in a fixed order, so that equal
inputs and equal thread counts give equal bits. Selection, dot products and the transpose are compiled loops on the
CPU (:mod:`~circuitflow.dictionaries.kernels`) and torch's operations elsewhere. Codes that are hardly sparse, as those
of ReLU at first, go through dense products, a block of rows at a time too. Trainable kinds are put together from
these pieces.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries import kernels, training_kernels
from circuitflow.dictionaries.codes import Codes, concatenate_codes, decode_codes
from circuitflow.dictionaries.selection import largest

Weights = Mapping[str, Tensor]
"""Trained tensors by name: W_enc (d_dict, d_model), b_enc (d_dict,), W_dec (d_dict, d_model), b_dec (d_model,) and
whatever else a kind learns (thresholds, gates)."""

Pull = Callable[[Tensor], Tensor]
"""From ∂loss/∂decoded (batch, d_model) to ∂loss/∂value (nnz,)."""

CPU_ENTRIES, OTHER_ENTRIES = 5 << 19, 1 << 28  # pre-activations held at once: 10 MiB, 1 GiB in float32
FEWEST_ROWS = 128  # of a block, however wide: smaller products are slower
# Share of entries from which dense products beat sums of rows, as measured on a CPU.
CPU_DENSE, OTHER_DENSE = 0.6, 0.1


def pre_activations(weights: Weights, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_dict"]:
    """x·W_encᵀ + b_enc as one matrix: for small inputs; training steps go by :func:`encoder_chunks`."""
    return torch.addmm(weights["b_enc"], x, weights["W_enc"].T)


def encoder_chunks(weights: Weights, x: Float[Tensor, "batch d_model"]) -> Iterator[tuple[slice, Tensor]]:
    """Pre-activations x·W_encᵀ + b_enc of a block of rows at a time: the rows, and (rows, d_dict).

    Reads ``W_enc`` and ``b_enc`` only. The matrix is a buffer that the next block overwrites. Under autocast the
    product is taken in its lower precision.
    """
    W_enc, b_enc, kind = weights["W_enc"], weights["b_enc"], x.device.type
    buffer = _buffer(x, W_enc.shape[0])
    lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if lower is not None:
        x, W_enc = x.to(lower), W_enc.to(lower)  # once, not in every block
    for block in _blocks(x.shape[0], buffer.shape[0]):
        pre = buffer[: block.stop - block.start]
        if lower is None:
            torch.addmm(b_enc, x[block], W_enc.T, out=pre)
        else:
            torch.add(b_enc, x[block] @ W_enc.T, out=pre)
        yield block, pre


def top_codes(weights: Weights, x: Float[Tensor, "batch d_model"], k: int) -> Codes:
    """The ``k`` largest pre-activations of each vector, those not positive left out."""
    select = kernels.largest_of_rows if x.device.type == "cpu" else largest
    return concatenate_codes([select(pre, k) for _, pre in encoder_chunks(weights, x)])


def codes_above(weights: Weights, x: Float[Tensor, "batch d_model"], threshold: Tensor) -> Codes:
    """The pre-activations above a threshold, of either sign.

    :param threshold: (d_dict,), each feature's own, or () for all.
    """
    each = threshold.to(x.dtype).expand(weights["b_enc"].shape).contiguous()
    return concatenate_codes([_above(pre, each) for _, pre in encoder_chunks(weights, x)])


def batch_top_codes(weights: Weights, x: Float[Tensor, "batch d_model"], n: int, guess: float = 0.0) -> Codes:
    """The ``n`` ≥ 1 largest positive pre-activations of the whole batch; of equal ones those that come first.

    Entries that can no longer be among them are dropped on the way, so that few are held.

    :param guess: a value that the smallest of them probably exceeds. It changes the time, not the result.
    """
    threshold, held, count = max(guess, 0.0), list[Codes](), 0
    for _, pre in encoder_chunks(weights, x):
        held.append(_above(pre, pre.new_full(pre.shape[1:], threshold)))
        count += held[-1].nnz
        if count > 2 * n:
            kept = _keep_largest(concatenate_codes(held), n)
            threshold, held, count = float(kept.values.min()), [kept], n
    codes = concatenate_codes(held)
    if codes.nnz < n and guess > 0:
        return batch_top_codes(weights, x, n)
    return codes if codes.nnz <= n else _keep_largest(codes, n)


def decode_with_pull(
    codes: Codes, W_dec: Float[Tensor, "d_dict d_model"]
) -> tuple[Float[Tensor, "batch d_model"], Pull]:
    """Σ_i value_i·W_dec[i], and the function that turns ∂loss/∂(that sum) into ∂loss/∂value of every entry.

    The pull is cotangent[row]·W_dec[feature], one dot product an entry.
    """
    if codes.nnz == 0:
        return decode_codes(codes, W_dec), lambda cotangent: codes.values
    if _is_dense(codes):
        return _decode_dense(codes, W_dec), lambda cotangent: _products_dense(codes, W_dec, cotangent)
    if W_dec.device.type == "cpu":
        return decode_codes(codes, W_dec), lambda cotangent: kernels.products(codes, W_dec, cotangent)
    # Torch's own kernel for the dot products is reached through autograd, which here holds nothing but the entries.
    values = codes.values.detach().requires_grad_(True)
    with torch.enable_grad():
        decoded = decode_codes(codes.with_values(values), W_dec)
    return decoded.detach(), lambda cotangent: torch.autograd.grad(decoded, values, cotangent)[0]


def weight_gradients(
    codes: Codes,
    dpre: Float[Tensor, " nnz"],
    x: Float[Tensor, "batch d_model"],
    cotangent: Float[Tensor, "batch d_model"],
) -> dict[str, Tensor]:
    """Gradients of the four common weights.

    :param dpre: ∂loss/∂pre-activation of every entry; where there is no entry it is zero.
    :param x: what the encoder read.
    :param cotangent: ∂loss/∂x̂.
    """
    if _is_dense(codes):
        gradients = _weight_gradients_dense(codes, dpre, x, cotangent)
    else:
        values, pulls, sums = _by_feature(codes, dpre)
        gradients = {"W_enc": decode_codes(pulls, x), "b_enc": sums, "W_dec": decode_codes(values, cotangent)}
    return gradients | {"b_dec": cotangent.sum(0)}


def _by_feature(codes: Codes, dpre: Float[Tensor, " nnz"]) -> tuple[Codes, Codes, Float[Tensor, " d_dict"]]:
    """The transpose with the values, that with ``dpre``, and the sum of ``dpre`` over each feature."""
    if dpre.device.type == "cpu":
        return training_kernels.by_feature_with(codes, dpre)
    values, pulls = codes.by_feature_with(dpre)
    return values, pulls, decode_codes(pulls, dpre.new_ones(codes.n, 1))[:, 0]


def _above(pre: Float[Tensor, "n d_dict"], threshold: Float[Tensor, " d_dict"]) -> Codes:
    if pre.device.type == "cpu":
        return kernels.above_threshold(pre, threshold)
    rows, features = (pre > threshold).nonzero(as_tuple=True)
    offsets = torch.nn.functional.pad(torch.bincount(rows, minlength=pre.shape[0]).cumsum(0), (1, 0))
    return Codes(offsets, features, pre[rows, features], pre.shape[1])


def _keep_largest(codes: Codes, n: int) -> Codes:
    if codes.values.device.type == "cpu":
        return training_kernels.keep_largest(codes, n)
    keep = torch.zeros_like(codes.values, dtype=torch.bool)
    keep[codes.values.argsort(descending=True, stable=True)[:n]] = True
    return codes.where(keep)


def _buffer(x: Float[Tensor, "batch d_model"], d_dict: int) -> Float[Tensor, "rows d_dict"]:
    """Room for the pre-activations of one block; blocks are as equal as can be."""
    entries = CPU_ENTRIES if x.device.type == "cpu" else OTHER_ENTRIES
    blocks = -(-x.shape[0] // max(FEWEST_ROWS, entries // max(1, d_dict)))
    return x.new_empty(-(-x.shape[0] // max(1, blocks)) or 1, d_dict)


def _blocks(n: int, rows: int) -> Iterator[slice]:
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def _is_dense(codes: Codes) -> bool:
    share = CPU_DENSE if codes.values.device.type == "cpu" else OTHER_DENSE
    return codes.nnz > share * codes.n * codes.d_dict


def _dense_blocks(codes: Codes, like: Tensor, *values: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """The codes as dense matrices (rows, d_dict), a block of rows at a time, once for each list of values."""
    buffers = [_buffer(like, codes.d_dict) for _ in values]
    rows, offsets = codes.rows(), codes.offsets
    for block in _blocks(codes.n, buffers[0].shape[0]):
        entries = slice(int(offsets[block.start]), int(offsets[block.stop]))
        dense = [buffer[: block.stop - block.start].zero_() for buffer in buffers]
        for matrix, each in zip(dense, values, strict=True):
            matrix[rows[entries] - block.start, codes.features[entries]] = each[entries]
        yield block, dense


def _decode_dense(codes: Codes, W_dec: Float[Tensor, "d_dict d_model"]) -> Float[Tensor, "batch d_model"]:
    out = W_dec.new_empty(codes.n, W_dec.shape[1])
    for block, (values,) in _dense_blocks(codes, out, codes.values):
        torch.mm(values, W_dec, out=out[block])
    return out


def _products_dense(
    codes: Codes, W_dec: Float[Tensor, "d_dict d_model"], cotangent: Float[Tensor, "batch d_model"]
) -> Float[Tensor, " nnz"]:
    out, rows, buffer = torch.empty_like(codes.values), codes.rows(), _buffer(cotangent, codes.d_dict)
    for block in _blocks(codes.n, buffer.shape[0]):
        entries = slice(int(codes.offsets[block.start]), int(codes.offsets[block.stop]))
        pulls = torch.mm(cotangent[block], W_dec.T, out=buffer[: block.stop - block.start])
        out[entries] = pulls[rows[entries] - block.start, codes.features[entries]]
    return out


def _weight_gradients_dense(
    codes: Codes, dpre: Float[Tensor, " nnz"], x: Tensor, cotangent: Tensor
) -> dict[str, Tensor]:
    W_enc, W_dec = (x.new_zeros(codes.d_dict, like.shape[1]) for like in (x, cotangent))
    b_enc = x.new_zeros(codes.d_dict)
    for block, (pulls, values) in _dense_blocks(codes, x, dpre, codes.values):
        W_enc.addmm_(pulls.T, x[block])
        W_dec.addmm_(values.T, cotangent[block])
        b_enc += pulls.sum(0)
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}

"""Forward and backward of a sparse dictionary, written out: the cost of a step is one dense product plus sparse work.

Only the encoder needs the dense (batch, d_dict) pre-activations. Everything after it reads the rows of active
features: decoding and both weight gradients are weighted sums of rows (``embedding_bag``), each computed by
one thread in a fixed order, so that equal inputs and equal thread counts give equal bits. Trainable kinds are
put together from these pieces.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes, decode_codes

Weights = Mapping[str, Tensor]
"""Trained tensors by name: W_enc (d_dict, d_model), b_enc (d_dict,), W_dec (d_dict, d_model), b_dec (d_model,) and
whatever else a kind learns (thresholds, gates)."""

Pull = Callable[[Tensor], Tensor]
"""From ∂loss/∂decoded (batch, d_model) to ∂loss/∂value (nnz,)."""


def pre_activations(weights: Weights, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_dict"]:
    """x·W_encᵀ + b_enc, the one dense product of a step."""
    return torch.addmm(weights["b_enc"], x, weights["W_enc"].T)


def decode_with_pull(
    codes: Codes, W_dec: Float[Tensor, "d_dict d_model"]
) -> tuple[Float[Tensor, "batch d_model"], Pull]:
    """Σ_i value_i·W_dec[i], and the function that turns ∂loss/∂(that sum) into ∂loss/∂value of every entry.

    The pull is cotangent[row]·W_dec[feature], one dot product an entry: torch's own kernel for it is reached
    through autograd, which here holds nothing but the entries.
    """
    if codes.nnz == 0:
        return decode_codes(codes, W_dec), lambda cotangent: codes.values
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
    values, pulls = codes.by_feature_with(dpre)
    return {
        "W_enc": decode_codes(pulls, x),
        "b_enc": decode_codes(pulls, x.new_ones(x.shape[0], 1))[:, 0],
        "W_dec": decode_codes(values, cotangent),
        "b_dec": cotangent.sum(0),
    }

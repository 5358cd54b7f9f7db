"""Nested reconstruction: the first features alone have to reconstruct too, so that they become the general ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.gradients import Pull, Weights, decode_with_pull, weight_gradients
from circuitflow.dictionaries.objective import Gradients


@dataclass(frozen=True)
class Nested:
    """Loss Σ_p mean ‖x − x̂_p‖² and its gradients, where x̂_p decodes the features of prefix ``p`` alone."""

    losses: list[Float[Tensor, ""]]
    """Mean ‖x − x̂_p‖² of every prefix, the whole dictionary last."""
    gradients: Gradients
    residual: Float[Tensor, "batch d_out"]
    """x̂ − y of the whole dictionary."""
    cotangent: Float[Tensor, "batch d_out"]
    """∂loss/∂b_dec of every vector: that of all prefixes together."""


def nested_reconstruction(
    codes: Codes,
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    ends: Sequence[int],
    y: Float[Tensor, "batch d_out"],
) -> Nested:
    """Reconstruct from every prefix; selected features pass their pre-activation on.

    A group of features between two ends sees the sum of the errors of all prefixes that it belongs to, so the
    sparse work is that of one reconstruction, whatever the number of prefixes.

    :param ends: numbers of features of the prefixes, ascending to d_dict.
    :param y: what is reconstructed; ``x`` where a site is written back.
    """
    groups = [_Group.of(codes, weights, start, end) for start, end in pairwise((0, *ends))]
    residuals, residual = [], weights["b_dec"] - y
    for group in groups:
        residual = residual + group.decoded
        residuals.append(residual)
    cotangent = torch.zeros_like(y)
    parts: list[Gradients] = []
    for group, error in zip(reversed(groups), reversed(residuals), strict=True):
        cotangent = cotangent + error * (2 / x.shape[0])
        parts.append(weight_gradients(group.codes, group.pull(cotangent), x, cotangent))
    gradients = {
        name: torch.cat([part[name] for part in reversed(parts)]) for name in ("W_enc", "b_enc", "W_dec")
    }
    losses = [error.square().sum() / x.shape[0] for error in residuals]
    return Nested(losses, {**gradients, "b_dec": parts[-1]["b_dec"]}, residual, cotangent)


@dataclass(frozen=True)
class _Group:
    """The features between two ends of prefixes."""

    codes: Codes
    decoded: Float[Tensor, "batch d_model"]
    pull: Pull

    @classmethod
    def of(cls, codes: Codes, weights: Weights, start: int, end: int) -> "_Group":
        if (start, end) != (0, codes.d_dict):
            codes = codes.where((codes.features >= start) & (codes.features < end))
            codes = Codes(codes.offsets, codes.features - start, codes.values, end - start)
        return cls(codes, *decode_with_pull(codes, weights["W_dec"][start:end]))

"""Inputs are trained on with their mean taken off and mean ‖x‖² = 1; saved weights take and give raw activations."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.rows import SiteRows


@dataclass(frozen=True)
class Normalisation:
    """x → (x − mean) / scale."""

    mean: Float[Tensor, " d_model"]
    scale: float

    def apply(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Raw to normalised vectors."""
        return (x - self.mean) / self.scale

    def fold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that take and give raw vectors, from weights for normalised ones.

        Feature values are multiplied by ``scale``, so that decoder rows keep their norm: with y = (x −
        mean)/scale, scale·(W_enc·y + b_enc) = W_enc·x + (scale·b_enc − W_enc·mean). Computed in float64,
        given in the weights' type.
        """
        wide = {name: weights[name].double().cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        mean = self.mean.double().cpu()
        folded = {
            "W_enc": wide["W_enc"],
            "b_enc": self.scale * wide["b_enc"] - wide["W_enc"] @ mean,
            "W_dec": wide["W_dec"],
            "b_dec": self.scale * wide["b_dec"] + mean,
        }
        return {name: tensor.to(weights[name].dtype) for name, tensor in folded.items()}


def measure_normalisation(rows: SiteRows, keep: np.ndarray) -> Normalisation:
    """Mean and root mean squared distance from it over the kept rows, summed in float64."""
    total = torch.zeros(rows.width, dtype=torch.float64)
    squares = 0.0
    for _, x in rows.read(keep):
        wide = x.double()
        total += wide.sum(dim=0)
        squares += float(wide.square().sum())
    n = int(keep.sum())
    mean = total / n
    variance = squares / n - float(mean.square().sum())
    return Normalisation(mean.float(), max(variance, 1e-30) ** 0.5)

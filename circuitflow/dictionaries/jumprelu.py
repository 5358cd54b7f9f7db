"""JumpReLU training (Rajamanoharan et al. 2024b): a learned threshold for every feature and a penalty on L0 itself.

Both the threshold's effect on the reconstruction and L0 are steps, with a gradient of zero almost everywhere.
Straight-through estimators replace it, with the rectangle kernel rect(u) = 1[|u| < 1/2] of width ``bandwidth``
around the threshold, on pre-activations h, those below the threshold included:

    ∂f/∂θ = −(θ/bandwidth)·rect((h − θ)/bandwidth)        ∂1[h > θ]/∂θ = −(1/bandwidth)·rect((h − θ)/bandwidth)

Everything else has its true gradient: ∂f/∂h = 1[h > θ], and L0 does not pull at h.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.gradients import Weights, codes_above, decode_with_pull, weight_gradients
from circuitflow.dictionaries.objective import COMMON, Context, Finished, Opened, Part, Step, solo
from circuitflow.dictionaries.relu import sums_by_feature

PACE = 10.0  # thresholds learn this much faster: Adam moves a logarithm by .0025 a step, too slow for short trainings


@dataclass(frozen=True)
class JumpReLU:
    """Objective of kind ``jumprelu``: mean ‖x − x̂‖² plus λ·L0 or, with a target, λ·(L0/L0* − 1)².

    L0 is the mean number of active features per token. Thresholds are learned as logarithms, which keeps them
    positive: θ = exp(PACE·``log_threshold``).
    """

    penalty: float
    """λ."""
    bandwidth: float
    first_threshold: float
    target_l0: float | None = None
    """L0*."""
    select: str = "threshold"
    unit_decoder: bool = True

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """ln θ / PACE."""
        return {"log_threshold": torch.full((d_dict,), math.log(self.first_threshold) / PACE)}

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def finish(self, weights: Weights) -> Finished:
        """The weights as they are, and the thresholds."""
        threshold = thresholds(weights)
        return Finished({name: weights[name] for name in COMMON}, {}, {"threshold": threshold})

    def step(
        self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context, y: Tensor | None = None
    ) -> Step:
        """Loss and gradients of one batch."""
        return solo(self.open(weights, x, context), weights["b_dec"], x if y is None else y)

    def open(self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context) -> Opened:
        """Encode and decode one batch."""
        threshold = thresholds(weights)
        near = codes_above(weights, x, threshold - self.bandwidth / 2)
        own = threshold[near.features]
        active = near.values > own
        values = torch.where(active, near.values, torch.zeros_like(near.values))
        decoded, pull = decode_with_pull(near.with_values(values), weights["W_dec"])

        def close(residual: Tensor, cotangent: Tensor) -> Part:
            dvalue = pull(cotangent)
            codes = near.where(active)
            gradients = weight_gradients(codes, dvalue[active], x, cotangent)
            penalty, slope = self._penalty(codes.nnz / x.shape[0], context.sparsity)
            steps = torch.where(near.values < own + self.bandwidth / 2, own * dvalue + slope / x.shape[0], 0)
            dthreshold = -sums_by_feature(near, steps) / self.bandwidth
            gradients["log_threshold"] = PACE * threshold * dthreshold
            return Part(gradients, codes.fired(), x.new_tensor(penalty), codes.nnz)

        return Opened(decoded, close)

    def _penalty(self, l0: float, sparsity: float) -> tuple[float, float]:
        """The penalty and its derivative by L0."""
        weight = sparsity * self.penalty
        if self.target_l0 is None:
            return weight * l0, weight
        over = l0 / self.target_l0 - 1
        return weight * over**2, 2 * weight * over / self.target_l0


def thresholds(weights: Weights) -> Float[Tensor, " d_dict"]:
    """θ of every feature."""
    return (PACE * weights["log_threshold"]).exp()

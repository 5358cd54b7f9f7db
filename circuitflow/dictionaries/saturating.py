"""ReLU and JumpReLU with the penalty of cross-layer transcoders (Ameisen et al. 2025, "Circuit Tracing", appendix).

    λ Σ_i tanh(c·‖W_dec,i‖·f_i)        ‖W_dec,i‖ over all sites that feature i writes

saturates, so that features that are clearly on pay for being on and not for how strongly. JumpReLU's thresholds learn
through f alone, by the straight-through estimator of :mod:`~circuitflow.dictionaries.jumprelu`. Features that have been
dead for long get a gradient from w Σ_i relu(θ_i − h_i)·‖W_dec,i‖ over their pre-activations h.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitflow.dictionaries.folding import unit_rows
from circuitflow.dictionaries.gradients import (
    Weights,
    codes_above,
    decode_with_pull,
    encoder_chunks,
    weight_gradients,
)
from circuitflow.dictionaries.jumprelu import PACE, thresholds
from circuitflow.dictionaries.objective import Context, Finished, Gradients, Opened, Part, Step, solo
from circuitflow.dictionaries.relu import sums_by_feature


@dataclass(frozen=True)
class Saturating:
    """Mean of ‖y − ŷ‖² + λ Σ tanh(c‖W_dec,i‖f_i) + w Σ_dead relu(θ_i − h_i)‖W_dec,i‖, decoder norms free."""

    penalty: float
    """λ."""
    saturation: float
    """c, for values of vectors scaled to mean ‖x‖² = 1."""
    dead_weight: float
    """w, likewise."""
    first_bias: float = 0.0
    """b_enc at first."""
    first_threshold: float | None = None
    """θ at first; None for ReLU, whose threshold stays 0."""
    bandwidth: float = 1.0
    """JumpReLU: width of the window in which thresholds get a gradient."""
    select: str = "threshold"
    unit_decoder: bool = False

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """The bias at its first value, and ln θ / PACE of JumpReLU."""
        bias = {"b_enc": torch.full((d_dict,), self.first_bias)}
        if self.first_threshold is None:
            return bias
        return bias | {"log_threshold": torch.full((d_dict,), math.log(self.first_threshold) / PACE)}

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def finish(self, weights: Weights) -> Finished:
        """Decoder norms folded into encoder and thresholds."""
        W_enc, b_enc, W_dec = unit_rows(weights["W_enc"], weights["b_enc"], weights["W_dec"])
        norms = weights["W_dec"].norm(dim=1)
        folded = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": weights["b_dec"]}
        return Finished(
            folded, {}, {"threshold": torch.where(norms > 0, norms, 1) * self._threshold(weights)}
        )

    def step(
        self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context, y: Tensor | None = None
    ) -> Step:
        """Loss and gradients of one batch."""
        return solo(self.open(weights, x, context), weights["b_dec"], x if y is None else y)

    def open(self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context) -> Opened:
        """Encode and decode one batch."""
        threshold, jumps = self._threshold(weights), self.first_threshold is not None
        near = codes_above(weights, x, threshold - self.bandwidth / 2 if jumps else threshold)
        own = threshold[near.features]
        active = near.values > own
        values = torch.where(active, near.values, torch.zeros_like(near.values))
        decoded, pull = decode_with_pull(near.with_values(values), weights["W_dec"])

        def close(residual: Tensor, cotangent: Tensor) -> Part:
            weight = context.sparsity * self.penalty / x.shape[0]
            norms = weights["W_dec"].norm(dim=1)
            reach = self.saturation * norms[near.features]
            height = torch.tanh(reach * values)
            slope = weight * (1 - height.square())
            dvalue = pull(cotangent) + slope * reach
            codes = near.where(active)
            gradients = weight_gradients(codes, dvalue[active], x, cotangent)
            dnorm = self.saturation * sums_by_feature(near, slope * values)
            if jumps:
                window = torch.where(near.values < own + self.bandwidth / 2, own * dvalue, 0)
                dthreshold = -sums_by_feature(near, window) / self.bandwidth
                gradients["log_threshold"] = PACE * threshold * dthreshold
            auxiliary = weight * height.sum() + self._revive(gradients, weights, x, context.dead, dnorm)
            tiny = torch.finfo(norms.dtype).tiny
            gradients["W_dec"] += (dnorm / norms.clamp_min(tiny))[:, None] * weights["W_dec"]
            return Part(gradients, codes.fired(), auxiliary, codes.nnz)

        return Opened(decoded, close)

    def _threshold(self, weights: Weights) -> Float[Tensor, " d_dict"]:
        return torch.zeros_like(weights["b_enc"]) if self.first_threshold is None else thresholds(weights)

    def _revive(
        self, gradients: Gradients, weights: Weights, x: Tensor, dead: Bool[Tensor, " d_dict"], dnorm: Tensor
    ) -> Float[Tensor, ""]:
        """w Σ relu(θ − h)·‖W_dec‖ over dead features; its gradients, and those by norms, are added in place."""
        features = dead.nonzero()[:, 0]
        if self.dead_weight <= 0 or features.numel() == 0:
            return x.new_zeros(())
        rows = {name: weights[name][features] for name in ("W_enc", "b_enc")}
        threshold = self._threshold(weights)[features]
        counts, missed = (torch.zeros_like(threshold) for _ in range(2))
        inputs = x.new_zeros(len(features), x.shape[1])
        for block, pre in encoder_chunks(rows, x):
            below = (threshold - pre).clamp_min(0)
            on = (below > 0).to(x.dtype)
            missed += below.sum(0)
            counts += on.sum(0)
            inputs += on.T @ x[block]
        weight = self.dead_weight / x.shape[0]
        pulls = weight * weights["W_dec"][features].norm(dim=1)
        gradients["W_enc"].index_add_(0, features, -pulls[:, None] * inputs)
        gradients["b_enc"].index_add_(0, features, -pulls * counts)
        if "log_threshold" in gradients:
            gradients["log_threshold"].index_add_(0, features, PACE * threshold * pulls * counts)
        dnorm.index_add_(0, features, weight * missed)
        return pulls @ missed

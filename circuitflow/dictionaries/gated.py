"""Gated training (Rajamanoharan et al. 2024a): which features are active and how strongly is decided apart.

    π = W_enc·x + b_enc          f = 1[π > 0]·relu(e^r·(W_enc·x) + b_mag)

The L1 penalty, which shrinks what it touches, acts on relu(π) alone. So that π stays useful, relu(π) must also
reconstruct, through a decoder that this term does not train.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.folding import gate_as_threshold
from circuitflow.dictionaries.gradients import Weights, codes_above, decode_with_pull, weight_gradients
from circuitflow.dictionaries.objective import Context, Finished, Step
from circuitflow.dictionaries.relu import sums_by_feature


@dataclass(frozen=True)
class Gated:
    """Objective of kind ``gated``: mean of ‖x − x̂(f)‖² + λ Σ relu(π) + ‖x − x̂_frozen(relu(π))‖².

    Learns r (``log_scale``) and ``b_mag`` besides the common weights; ``b_enc`` is the gate's bias.
    """

    penalty: float
    """λ."""
    first_bias: float
    """Both biases at first: negative, so that training does not start with half of all features active."""
    select: str = "threshold"
    unit_decoder: bool = True

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """r and b_mag, so that at first f = relu(π); and the gate's bias."""
        bias = torch.full((d_dict,), self.first_bias)
        return {"b_enc": bias, "b_mag": bias.clone(), "log_scale": torch.zeros(d_dict)}

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def finish(self, weights: Weights) -> Finished:
        """One encoder e^r·W_enc, b_mag; π > 0 is the same as a threshold b_mag − e^r·b_enc on its output."""
        W_enc, b_enc, threshold = gate_as_threshold(
            weights["W_enc"], weights["log_scale"], weights["b_enc"], weights["b_mag"]
        )
        folded = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": weights["W_dec"], "b_dec": weights["b_dec"]}
        return Finished(folded, {}, {"threshold": threshold})

    def step(
        self, weights: Weights, x: Float[Tensor, "batch d_model"], context: Context, y: Tensor | None = None
    ) -> Step:
        """Loss and gradients of one batch.

        :raises ValueError: another target than ``x``, which this kind is not made for.
        """
        if y is not None:
            raise ValueError("kind gated reconstructs what it reads; choose another kind for transcoders")
        gate = codes_above(weights, x, x.new_zeros(()))
        at, scale = gate.features, weights["log_scale"].exp()
        grown = scale[at] * (gate.values - weights["b_enc"][at])  # e^r·(W_enc·x)
        values = grown + weights["b_mag"][at]
        active = values > 0
        values = values.clamp_min(0)
        decoded, pull = decode_with_pull(gate.with_values(values), weights["W_dec"])
        residual = decoded + weights["b_dec"] - x
        cotangent = residual * (2 / x.shape[0])
        dvalue = torch.where(active, pull(cotangent), 0)
        auxiliary, dgate = self._gate_loss(gate, weights, x, context)
        gradients = weight_gradients(gate.with_values(values), scale[at] * dvalue + dgate, x, cotangent)
        gradients["b_enc"] = sums_by_feature(gate, dgate)
        gradients["b_mag"] = sums_by_feature(gate, dvalue)
        gradients["log_scale"] = sums_by_feature(gate, dvalue * grown)
        fired = torch.zeros_like(context.dead)
        fired[at[active]] = True
        reconstruction = residual.square().sum() / x.shape[0]
        return Step(gradients, fired, reconstruction, auxiliary, int(active.sum()))

    def _gate_loss(
        self, gate: Codes, weights: Weights, x: Float[Tensor, "batch d_model"], context: Context
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " nnz"]]:
        """The terms that train the gate, and their derivative by π at every entry."""
        decoded, pull = decode_with_pull(gate, weights["W_dec"])
        residual = decoded + weights["b_dec"] - x
        weight = context.sparsity * self.penalty / x.shape[0]
        loss = residual.square().sum() / x.shape[0] + weight * gate.values.sum()
        return loss, pull(residual * (2 / x.shape[0])) + weight

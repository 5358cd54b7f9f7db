"""TopK training: squared error of the k largest pre-activations, and AuxK, which gives dead features a gradient."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.gradients import Weights, decode_with_pull, pre_activations, weight_gradients
from circuitflow.dictionaries.objective import Context, Gradients, Inference, Step
from circuitflow.dictionaries.selection import largest


@dataclass(frozen=True)
class AuxK:
    """The ``k`` most active dead features of each token predict what the living ones leave over (Gao et al. 2024)."""

    k: int
    weight: float

    def gradients(
        self,
        pre: Float[Tensor, "batch d_dict"],
        error: Float[Tensor, "batch d_model"],
        weights: Weights,
        x: Float[Tensor, "batch d_model"],
        context: Context,
    ) -> tuple[Float[Tensor, ""], Gradients]:
        """weight · Σ‖error − ê‖² / Σ‖error‖² with the error held fixed, and its gradients in rows of dead features.

        ê = Σ f_i·W_dec[i] over dead features, without b_dec. The gradients have one row per dead feature.
        """
        dead = context.dead.nonzero()[:, 0]
        codes = largest(pre[:, dead], self.k)
        decoded, pull = decode_with_pull(codes, weights["W_dec"][dead])
        scale = self.weight / error.square().sum().clamp_min(torch.finfo(error.dtype).tiny)
        cotangent = 2 * scale * (decoded - error)
        gradients = weight_gradients(codes, pull(cotangent), x, cotangent)
        del gradients["b_dec"]
        return scale * (decoded - error).square().sum(), gradients


@dataclass(frozen=True)
class TopK:
    """Objective of kind ``topk``: mean ‖x − x̂‖² plus AuxK. Selected features pass their pre-activation on."""

    k: int
    aux: AuxK
    select: str = "topk"

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """None: TopK learns nothing besides encoder and decoder."""
        return {}

    def inference(self, weights: Weights, scale: float) -> Inference:
        """k, whatever the scale."""
        return Inference({"k": self.k}, {})

    def step(self, weights: Weights, x: Float[Tensor, "batch d_model"], context: Context) -> Step:
        """Loss and gradients of one batch."""
        pre = pre_activations(weights, x)
        codes = largest(pre, self.k)
        decoded, pull = decode_with_pull(codes, weights["W_dec"])
        residual = decoded + weights["b_dec"] - x
        cotangent = residual * (2 / x.shape[0])
        gradients = weight_gradients(codes, pull(cotangent), x, cotangent)
        reconstruction = residual.square().sum() / x.shape[0]
        auxiliary = x.new_zeros(())
        if self.aux.weight > 0 and bool(context.dead.any()):
            auxiliary, added = self.aux.gradients(pre, -residual, weights, x, context)
            for name, rows in added.items():
                gradients[name][context.dead] += rows
        fired = torch.zeros_like(context.dead)
        fired[codes.features] = True
        return Step(gradients, fired, reconstruction, auxiliary, codes.nnz)

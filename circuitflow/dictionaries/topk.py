"""TopK training: squared error of the k largest pre-activations, and AuxK, which gives dead features a gradient."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.gradients import Weights, decode_with_pull, top_codes, weight_gradients
from circuitflow.dictionaries.objective import (
    COMMON,
    Context,
    Finished,
    Gradients,
    Opened,
    Part,
    Step,
    solo,
)


@dataclass(frozen=True)
class AuxK:
    """The ``k`` most active dead features of each token predict what the living ones leave over (Gao et al. 2024).

    Every kind that selects the largest features (TopK, BatchTopK, Matryoshka) adds it to its own gradients.
    """

    k: int
    weight: float

    def add_to(
        self,
        gradients: Gradients,
        error: Float[Tensor, "batch d_model"],
        weights: Weights,
        x: Float[Tensor, "batch d_model"],
        context: Context,
    ) -> Float[Tensor, ""]:
        """weight · Σ‖error − ê‖² / Σ‖error‖² with the error held fixed; its gradients are added in place.

        ê = Σ f_i·W_dec[i] over dead features, without b_dec. Only rows of dead features have a gradient, and only
        their pre-activations are computed again. 0 where nothing is dead or the weight is 0.

        :param error: x − x̂ of the living features.
        """
        dead = context.dead.nonzero()[:, 0]
        if self.weight <= 0 or dead.numel() == 0:
            return x.new_zeros(())
        rows = {name: weights[name][dead] for name in ("W_enc", "b_enc", "W_dec")}
        codes = top_codes(rows, x, self.k)
        decoded, pull = decode_with_pull(codes, rows["W_dec"])
        scale = self.weight / error.square().sum().clamp_min(torch.finfo(error.dtype).tiny)
        missed = decoded - error
        cotangent = missed * (2 * scale)
        added = weight_gradients(codes, pull(cotangent), x, cotangent)
        for name in rows:
            gradients[name].index_add_(0, dead, added[name])
        return scale * missed.square().sum()


def annealed(k: int, k_start: int | None, k_anneal: float, done: float) -> int:
    """Active features per token after a share ``done`` of the steps: from ``k_start`` down to ``k``, linearly.

    :param k_anneal: share of the steps over which it falls.
    """
    if k_start is None or done >= k_anneal:
        return k
    return round(k_start + (k - k_start) * done / k_anneal)


@dataclass(frozen=True)
class TopK:
    """Objective of kind ``topk``: mean ‖x − x̂‖² plus AuxK. Selected features pass their pre-activation on."""

    k: int
    aux: AuxK
    k_start: int | None = None
    k_anneal: float = 0.0
    select: str = "topk"
    unit_decoder: bool = True

    def k_at(self, done: float) -> int:
        """Active features per token after a share ``done`` of the steps."""
        return annealed(self.k, self.k_start, self.k_anneal, done)

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """None: TopK learns nothing besides encoder and decoder."""
        return {}

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def finish(self, weights: Weights) -> Finished:
        """The weights as they are, and k."""
        return Finished({name: weights[name] for name in COMMON}, {"k": self.k}, {})

    def step(
        self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context, y: Tensor | None = None
    ) -> Step:
        """Loss and gradients of one batch."""
        return solo(self.open(weights, x, context), weights["b_dec"], x if y is None else y)

    def open(self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context) -> Opened:
        """Encode and decode one batch."""
        codes = top_codes(weights, x, self.k_at(context.done))
        return opened(codes, weights, x, context, self.aux)


def opened(
    codes: Codes,
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    context: Context,
    aux: AuxK,
    tracked: dict[str, Tensor] | None = None,
) -> Opened:
    """A step with these features selected, which pass their pre-activation on; AuxK in the end overwrites x̂ − x."""
    decoded, pull = decode_with_pull(codes, weights["W_dec"])

    def close(residual: Tensor, cotangent: Tensor) -> Part:
        gradients = weight_gradients(codes, pull(cotangent), x, cotangent)
        auxiliary = aux.add_to(gradients, residual.neg_(), weights, x, context)
        return Part(gradients, codes.fired(), auxiliary, codes.nnz, tracked or {})

    return Opened(decoded, close)

"""ReLU training: squared error plus an L1 penalty that knows the decoder's norms (Conerly et al. 2024).

Without them the penalty could be had for nothing, by small features and long decoder rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.folding import unit_rows
from circuitflow.dictionaries.gradients import Weights, codes_above, decode_with_pull, weight_gradients
from circuitflow.dictionaries.objective import Context, Finished, Opened, Part, Step, solo


@dataclass(frozen=True)
class ReLU:
    """Objective of kind ``relu``: mean of ‖x − x̂‖² + λ Σ_i f_i‖W_dec,i‖, decoder norms free.

    A crosscoder's norms are those of every site, summed: ‖W_dec,i‖ stands for Σ_s ‖W_dec,i^s‖ (Lindsey et al. 2024).
    """

    penalty: float
    """λ."""
    first_bias: float
    """b_enc at first: negative, so that training does not start with half of all features active."""
    select: str = "threshold"
    unit_decoder: bool = False
    sites: int = 1
    """Sites written, side by side in x̂."""

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """No new ones; the bias starts at a value of the kind's own."""
        return {"b_enc": torch.full((d_dict,), self.first_bias)}

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def finish(self, weights: Weights) -> Finished:
        """Decoder norms folded into the encoder; every feature is active above 0."""
        W_enc, b_enc, W_dec = unit_rows(weights["W_enc"], weights["b_enc"], weights["W_dec"])
        folded = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": weights["b_dec"]}
        return Finished(folded, {}, {"threshold": torch.zeros_like(b_enc)})

    def step(
        self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context, y: Tensor | None = None
    ) -> Step:
        """Loss and gradients of one batch."""
        return solo(self.open(weights, x, context), weights["b_dec"], x if y is None else y)

    def open(self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context) -> Opened:
        """Encode and decode one batch."""
        codes = codes_above(weights, x, x.new_zeros(()))
        decoded, pull = decode_with_pull(codes, weights["W_dec"])

        def close(residual: Tensor, cotangent: Tensor) -> Part:
            weight = context.sparsity * self.penalty / x.shape[0]
            by_site = weights["W_dec"].unflatten(1, (self.sites, -1)).norm(dim=2)
            norms = by_site.sum(dim=1)
            dpre = pull(cotangent) + weight * norms[codes.features]
            gradients = weight_gradients(codes, dpre, x, cotangent)
            sums = sums_by_feature(codes, codes.values)
            share = weight * sums[:, None] / by_site.clamp_min(torch.finfo(norms.dtype).tiny)
            gradients["W_dec"] += (
                share.repeat_interleave(cotangent.shape[1] // self.sites, 1) * weights["W_dec"]
            )
            return Part(gradients, codes.fired(), weight * (sums @ norms), codes.nnz)

        return Opened(decoded, close)


def sums_by_feature(codes: Codes, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_dict"]:
    """Σ of one number an entry, for every feature."""
    return values.new_zeros(codes.d_dict).index_add_(0, codes.features, values)

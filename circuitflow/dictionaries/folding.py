"""Other forms of a dictionary in the one that inference uses: unit decoder rows, and a threshold in place of a gate."""

import torch
from jaxtyping import Float
from torch import Tensor


def unit_rows(
    W_enc: Float[Tensor, "d_dict d_in"], b_enc: Float[Tensor, " d_dict"], W_dec: Float[Tensor, "d_dict d_out"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same reconstruction with decoder rows of norm 1: their norms move to the encoder. Rows of 0 stay."""
    norms = W_dec.norm(dim=1)
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    return W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]


def gate_as_threshold(
    W_enc: Float[Tensor, "d_dict d_in"],
    r_mag: Float[Tensor, " d_dict"],
    b_gate: Float[Tensor, " d_dict"],
    b_mag: Float[Tensor, " d_dict"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder rows, biases and thresholds that make a Gated encoder one with thresholds (Rajamanoharan et al. 2024).

    With the projection p = W_enc·x, the gate opens where p + b_gate > 0, and the magnitude is
    relu(e^r·p + b_mag): so a feature is active where m = e^r·p + b_mag exceeds max(0, b_mag − e^r·b_gate).
    Computed in float64, given in the weights' type.
    """
    scale = r_mag.double().exp()
    rows = scale[:, None] * W_enc.double()
    threshold = (b_mag.double() - scale * b_gate.double()).clamp(min=0)
    return rows.to(W_enc.dtype), b_mag, threshold.to(b_mag.dtype)

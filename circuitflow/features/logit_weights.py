"""What a feature writes, read directly by the unembedding: the tokens whose logits it raises and lowers."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitflow.features.firing import rounded
from circuitflow.models.running import LanguageModel

CONVENTION = (
    "logit weight = W_dec · gain of the final norm · W_U, minus its mean over the vocabulary; directions "
    "are centred first where the norm is a LayerNorm. Left out: the norm's scale (a positive factor per "
    "token), its bias, soft-capping, and everything that layers between the site and the end do with the "
    "feature."
)


def logit_weights(lm: LanguageModel, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    """Direct effect of each direction on the logits, per unit of activation, up to the scale of the final norm."""
    gain, centred = norm_gain(lm.hf.get_submodule(lm.arch.final_norm), lm.d_model)
    unembedding = lm.hf.get_submodule(lm.arch.unembed).weight.float()
    directions = directions.float().to(unembedding.device)
    if centred:
        directions = directions - directions.mean(dim=1, keepdim=True)
    weights = (directions * gain) @ unembedding.T
    return weights - weights.mean(dim=1, keepdim=True)


def norm_gain(norm: nn.Module, d_model: int) -> tuple[Float[Tensor, " d_model"], bool]:
    """The factor that a norm multiplies each coordinate with, and whether it subtracts the mean first.

    An RMS norm of a constant vector is its gain, whichever way the family stores it (Gemma keeps gain − 1).
    """
    if isinstance(norm, nn.LayerNorm):
        return norm.weight.float(), True
    weight = next(norm.parameters())
    large = torch.full((d_model,), 1e3, dtype=weight.dtype, device=weight.device)  # so that ε does not count
    return norm(large).float(), False


def extremes(weights: Float[Tensor, " vocab"], count: int) -> dict[str, list[dict[str, Any]]]:
    """The ``count`` tokens (ids) with the largest and with the smallest weights, the most extreme first."""
    order = torch.argsort(weights, descending=True, stable=True)
    chosen = {"top": order[:count], "bottom": order.flip(0)[:count]}
    return {
        side: [{"id": int(token), "weight": rounded(float(weights[token]))} for token in tokens]
        for side, tokens in chosen.items()
    }

"""What a feature writes, read directly by the unembedding: the tokens whose logits it raises and lowers."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitflow.features.firing import rounded
from circuitflow.models.attention_weights import norms, value_output
from circuitflow.models.running import LanguageModel
from circuitflow.models.sites import parse_site

CONVENTION = (
    "logit weight = W_dec · gain of the final norm · W_U, minus its mean over the vocabulary; directions "
    "are centred first where the norm is a LayerNorm. Rows at z.L are taken through the attention's output projection "
    "first; those at mlp_in.L, which add nothing to the stream by themselves, have no logit weights. Left out: the "
    "norm's scale (a positive factor per token), its bias, soft-capping, and everything that layers between the site "
    "and the end do with the feature."
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


def in_stream(
    lm: LanguageModel, site: str, directions: Float[Tensor, "n d"]
) -> Float[Tensor, "n d_model"] | None:
    """What directions at a site add to the residual stream, up to the scale of a post-norm.

    None at mlp_in, whose vectors are the stream after a norm: nothing is added there.
    """
    parsed = parse_site(site)
    if parsed.kind == "mlp_in":
        return None
    if parsed.kind != "z" or parsed.layer is None:
        return directions
    output = value_output(lm, parsed.layer, torch.float32).output
    added = directions.float().to(output.device) @ output.T
    after = norms(lm, parsed.layer).after_attention
    return added if after is None else added * norm_gain(after, lm.d_model)[0]


def listed_logits(
    lm: LanguageModel, site: str, directions: Float[Tensor, "n d"], count: int
) -> list[dict[str, dict[str, list[dict[str, Any]]]]]:
    """For each direction at a site an entry with its ``logits`` (:func:`extremes`), or an empty one."""
    added = in_stream(lm, site, directions)
    if added is None:
        return [{} for _ in directions]
    return [{"logits": extremes(weights, count)} for weights in logit_weights(lm, added)]


def norm_gain(norm: nn.Module, d_model: int) -> tuple[Float[Tensor, " d_model"], bool]:
    """The factor that a norm multiplies each coordinate with, and whether it subtracts the mean first.

    An RMS norm of a constant vector is its gain, whichever way the family stores it (Gemma keeps gain − 1).
    """
    if isinstance(norm, nn.LayerNorm):
        return norm.weight.float(), True
    weight = next(norm.parameters())
    large = torch.full(
        (d_model,), 1e3, device=weight.device
    )  # so that ε does not count; wide, or gains are rounded
    return norm(large).float(), False


def extremes(weights: Float[Tensor, " vocab"], count: int) -> dict[str, list[dict[str, Any]]]:
    """The ``count`` tokens (ids) with the largest and with the smallest weights, the most extreme first."""
    order = torch.argsort(weights, descending=True, stable=True)
    chosen = {"top": order[:count], "bottom": order.flip(0)[:count]}
    return {
        side: [{"id": int(token), "weight": rounded(float(weights[token]))} for token in tokens]
        for side, tokens in chosen.items()
    }

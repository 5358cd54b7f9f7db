"""Attention as every model here computes it: one plain implementation for all architectures.

Why not the ready-made ones: the fused CPU kernel of PyTorch's scaled_dot_product_attention has no second derivative
and no soft-capping; the "eager" functions of transformers compute the softmax in float32 even for float64 models, which
spoils exact tests, and copy keys and values for grouped queries. On prompts and blocks of a few hundred tokens, with
gradients and batched vector-Jacobian products or without, this one is as fast, and it gives the same numbers each time.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

ATTENTION = "circuitflow"
"""Name under which transformers finds :func:`attend`."""

RULE = "circuitflow_rule"
"""Attribute of an attention module that changes its derivative (never its values): "frozen" or "half"."""


def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads pos d_head"],
    key: Float[Tensor, "batch kv_heads pos d_head"],
    value: Float[Tensor, "batch kv_heads pos d_head"],
    attention_mask: Float[Tensor, "batch 1 pos pos"] | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch pos heads d_head"], None]:
    """Softmax attention with an additive mask, grouped queries and optional soft-capping of the scores.

    The signature is that of a transformers attention function; dropout is ignored: models only run here.
    """
    batch, heads, pos, d_head = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * pos, d_head)
    scores = torch.matmul(grouped, key.transpose(-1, -2)) * (d_head**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Half precision is summed in float32, as models of that precision were trained; the mask is added there as well,
    # since in float16 it would overflow to a row of −inf at padding that a sliding window cuts off from real tokens.
    wide = torch.float32 if scores.dtype in (torch.float16, torch.bfloat16) else scores.dtype
    scores = scores.view(batch, heads, pos, pos).to(wide)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    mixed = _mixed(weights.view(batch, kv_heads, -1, pos), value, getattr(module, RULE, None))
    return mixed.view(batch, heads, pos, d_head).transpose(1, 2).contiguous(), None


def patterns(
    module: torch.nn.Module,
    query: Float[Tensor, "batch heads pos d_head"],
    key: Float[Tensor, "batch kv_heads pos d_head"],
    attention_mask: Float[Tensor, "batch 1 pos pos"] | None,
    **options: Any,
) -> Float[Tensor, "batch heads pos pos"]:
    """Weight of every key for every query, at least float32: what :func:`attend` makes of unit vectors as values."""
    width, pos = key.shape[-1], key.shape[2]
    unit = torch.eye(pos, device=key.device, dtype=torch.promote_types(key.dtype, torch.float32))
    unit = torch.nn.functional.pad(unit, (0, -pos % width))
    mixed = [
        attend(module, query, key, part.expand(*key.shape[:2], -1, -1), attention_mask, **options)[0]
        for part in unit.split(width, dim=1)  # a head's width of them at a time
    ]
    return torch.cat(mixed, dim=-1)[..., :pos].transpose(1, 2)


def _mixed(weights: Tensor, value: Tensor, rule: str | None) -> Tensor:
    """weights @ value; with the rule "frozen" the weights are constants, with "half" each factor passes half."""
    if rule == "frozen":
        return torch.matmul(weights.detach(), value)
    mixed = torch.matmul(weights, value)
    if rule is None:
        return mixed
    half = 0.5 * (torch.matmul(weights, value.detach()) + torch.matmul(weights.detach(), value))
    return mixed.detach() + (half - half.detach())


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)

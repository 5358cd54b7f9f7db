"""Value and output weights of attention, and norms as fixed linear maps, the same way for every architecture."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitflow.models.running import LanguageModel


class Norms(NamedTuple):
    """A block's norms, by what they stand before or after; None where there is none."""

    before_attention: nn.Module
    after_attention: nn.Module | None
    before_mlp: nn.Module


class ValueOutput(NamedTuple):
    """How attention reads and writes the stream once its patterns are fixed."""

    value: Float[Tensor, "kv d_model"]
    """W_V: values of all key-value heads, one below the other (kv = kv_heads · d_head)."""
    value_bias: Float[Tensor, " kv"] | None
    output: Float[Tensor, "d_model z"]
    """W_O (z = heads · d_head)."""
    output_bias: Float[Tensor, " d_model"] | None


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its scale held: x → scale · weight ⊙ (x − mean x if centred) + bias."""

    scale: Float[Tensor, " pos"]
    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    centred: bool

    def pull(
        self, G: Float[Tensor, "... pos d_model"], positions: Tensor | slice = slice(None)
    ) -> Float[Tensor, "... pos d_model"]:
        """Gradient with respect to the norm's input from that with respect to its output, at some positions."""
        return self._centre(G * self.weight) * self.scale[positions, None]

    def fold(self, matrix: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """A matrix that reads the norm's output, made to read its input / scale: matrix · diag(weight) · centring."""
        return self._centre(matrix * self.weight)

    def _centre(self, G: Tensor) -> Tensor:
        return G - G.mean(-1, keepdim=True) if self.centred else G


def frozen_norm(module: Any, x: Float[Tensor, "pos d_model"], dtype: torch.dtype) -> FrozenNorm:
    """The norm as it acts on x, layer norm or RMS norm."""
    x = x.to(dtype)
    centred = isinstance(module, nn.LayerNorm)
    eps = float(getattr(module, "variance_epsilon", None) or module.eps)
    spread = x - x.mean(-1, keepdim=True) if centred else x
    scale = torch.rsqrt(spread.square().mean(-1) + eps)
    if centred:
        bias = None if module.bias is None else module.bias.to(dtype)
        return FrozenNorm(scale, module.weight.to(dtype), bias, True)
    # Some RMS norms scale by 1 + weight: what they make of a vector of ones tells.
    ones = torch.ones(x.shape[-1], dtype=dtype, device=x.device)
    return FrozenNorm(scale, module(ones).to(dtype) * (1.0 + eps) ** 0.5, None, False)


def norms(lm: LanguageModel, layer: int) -> Norms:
    """The norms of one block."""
    block: Any = lm.blocks[layer]
    name = lm.arch.name
    if name == "gpt2":
        return Norms(block.ln_1, None, block.ln_2)
    if name in ("gemma2", "gemma3_text"):
        return Norms(block.input_layernorm, block.post_attention_layernorm, block.pre_feedforward_layernorm)
    return Norms(block.input_layernorm, None, block.post_attention_layernorm)


def value_output(lm: LanguageModel, layer: int, dtype: torch.dtype) -> ValueOutput:
    """W_V and W_O of one block with their biases, in the given precision."""
    block: Any = lm.blocks[layer]
    name = lm.arch.name
    if name == "gpt2":  # matrices are (in, out), and queries, keys and values lie side by side
        split = block.attn.split_size
        value = block.attn.c_attn.weight[:, 2 * split :].T, block.attn.c_attn.bias[2 * split :]
        output = block.attn.c_proj.weight.T, block.attn.c_proj.bias
    elif name == "gpt_neox":  # query, key and value of a head follow each other
        joint, output = block.attention.query_key_value, _of(block.attention.dense)
        heads, d_head = lm.hf.config.num_attention_heads, block.attention.head_size
        weight = joint.weight.view(heads, 3, d_head, -1)[:, 2].flatten(0, 1)
        value = weight, None if joint.bias is None else joint.bias.view(heads, 3, d_head)[:, 2].flatten()
    else:
        value, output = _of(block.self_attn.v_proj), _of(block.self_attn.o_proj)
    return ValueOutput(*(None if part is None else part.to(dtype) for part in (*value, *output)))  # type: ignore[arg-type]


def _of(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias

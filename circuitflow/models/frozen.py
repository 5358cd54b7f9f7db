"""The model on one prompt with attention patterns and norm scales held fixed: its linear backward, written out.

With these held, and MLP outputs taken for sources of their own, everything between two places of the stream is a
product of known matrices (Ameisen et al. 2025: the local replacement model). A gradient is pulled through a block's
attention as G·W_O → patterns → W_V, scales and weights of norms folded in: no autograd graph, no copies of the prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from circuitflow.errors import UserError
from circuitflow.models.attention import ATTENTION, attend, patterns
from circuitflow.models.attention_weights import FrozenNorm, frozen_norm, norms, value_output
from circuitflow.models.modules import attention_of
from circuitflow.models.running import LanguageModel, run

RECORDING = "circuitflow_recording"
"""Name under which transformers finds the attention that also keeps its patterns."""
KEPT = "circuitflow_patterns"
"""Attribute of an attention module: the list that its patterns go to."""


@dataclass(frozen=True)
class FrozenLayer:
    """One block's attention, linear, and the norm of its MLP."""

    output: Float[Tensor, "d_model z"]
    """W_O with the weight of a norm after attention folded in (z = heads · d_head)."""
    pattern: Float[Tensor, "heads pos pos"]
    """[h, q, k]: attention of query q to key k × scale of the norm before at k × scale of a norm after at q."""
    value: Float[Tensor, "kv d_model"]
    """W_V with the weight (and centring) of the norm before attention folded in."""
    constant: Float[Tensor, "pos d_model"] | None
    """What attention adds to the stream whatever it reads: biases. None if there are none."""
    mlp_norm: FrozenNorm

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.pattern.shape[0]

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.output.shape[1] // self.heads

    @property
    def kv_heads(self) -> int:
        """Key-value heads, each shared by heads / kv_heads neighbouring query heads."""
        return self.value.shape[0] // self.d_head


@dataclass(frozen=True)
class FrozenPrompt:
    """What one true forward pass of a prompt left, and the linear maps that follow from it."""

    tokens: Int64[Tensor, " pos"]
    parallel: bool
    """Whether a block's MLP reads what its attention reads, rather than what comes after attention."""
    layers: tuple[FrozenLayer, ...]
    embed: Float[Tensor, "pos d_model"]
    """Input of the first block: token (and position) embeddings, scaled as the model does."""
    sites: dict[str, Float[Tensor, "pos width"]]
    """mlp_in.L and mlp.L of every layer, and what else was asked for."""
    final_norm: FrozenNorm
    unembed: Float[Tensor, "vocab d_model"]
    unembed_bias: Float[Tensor, " vocab"] | None
    logits: Float[Tensor, " vocab"]
    """True logits at the last position, soft-cap included."""

    @property
    def n_pos(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens)

    @property
    def n_layers(self) -> int:
        """Blocks."""
        return len(self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the linear maps."""
        return self.embed.dtype

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        tokens: Int64[Tensor, " pos"],
        capture: Sequence[str] = (),
        dtype: torch.dtype | None = None,
    ) -> "FrozenPrompt":
        """Run the model once and hold its patterns and scales.

        :param capture: sites whose values are wanted beside mlp_in.L and mlp.L.
        :param dtype: precision of the linear maps; by default the model's, at least float32.
        :raises UserError: no token.
        """
        if not len(tokens):
            raise UserError("The prompt has no token; give a text that is not empty.")
        wide = dtype or (torch.float64 if lm.dtype == torch.float64 else torch.float32)
        sites = [f"{kind}.{layer}" for layer in range(lm.n_layers) for kind in ("mlp_in", "mlp")]
        wanted = list(dict.fromkeys(["embed", *sites, *capture, f"resid.{lm.n_layers - 1}"]))
        tokens = torch.as_tensor(tokens, dtype=torch.int64, device=lm.device)
        with torch.no_grad(), _seen(lm) as seen:
            mask = torch.ones(1, len(tokens), dtype=torch.bool, device=lm.device)
            this = run(lm, tokens[None], mask, capture=wanted)
            assert this.last is not None
            logits = lm.unembed(this.last[0, -1:])[0]
            layers = tuple(_layer(lm, layer, seen, wide) for layer in range(lm.n_layers))
            final = frozen_norm(lm._final_norm, this.last[0], wide)
        unembed: Any = lm._unembed
        return cls(
            tokens=tokens,
            parallel=lm.arch.parallel,
            layers=layers,
            embed=this.sites["embed"][0].to(wide),
            sites={name: this.sites[name][0].to(wide) for name in wanted},
            final_norm=final,
            unembed=unembed.weight,
            unembed_bias=unembed.bias,
            logits=logits.to(wide),
        )

    def pull_attention(
        self, layer: int, G: Float[Tensor, "batch pos d_model"], heads: Sequence[int] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Gradient at the stream that attention reads (before its norm), from that at what attention adds to it.

        The stream's own way past attention is no part of it: the whole gradient there is G plus this.

        :param heads: only what goes through these heads; the parts of all heads sum to the whole.
        """
        held = self.layers[layer]
        batch, pos, _ = G.shape
        z = (G @ held.output).view(batch, pos, held.kv_heads, -1, held.d_head)
        pattern = held.pattern if heads is None else _only(held.pattern, heads)
        pattern = pattern.view(held.kv_heads, -1, pos, pos)
        mixed = torch.einsum("vgqk,bqvgd->bkvd", pattern, z)
        return mixed.reshape(batch, pos, -1) @ held.value

    def mlp_input(
        self, layer: int, positions: Int64[Tensor, " n"] | int, rows: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n d_model"]:
        """Gradient at the stream, at each row's own position, from one at mlp_in.L such as a row of an encoder.

        The stream is resid_mid.L, or the block's input where blocks are parallel.
        """
        at = torch.as_tensor(positions, dtype=torch.int64, device=self.embed.device).expand(len(rows))
        return self.layers[layer].mlp_norm.pull(rows.to(self.dtype), at)

    def final(self, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Gradient at the last block's output, last position, from one at what the unembedding reads."""
        last = torch.full((len(rows),), self.n_pos - 1, device=self.embed.device)
        return self.final_norm.pull(rows.to(self.dtype), last)

    def logit_rows(self, tokens: Int64[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """Rows of the unembedding with the vocabulary's mean row taken off."""
        return self.unembed[tokens].to(self.dtype) - self.unembed.mean(0, dtype=self.dtype)

    def logit_biases(self, tokens: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Biases of the unembedding with their mean taken off; 0 without biases."""
        if self.unembed_bias is None:
            return self.embed.new_zeros(len(tokens))
        return self.unembed_bias[tokens].to(self.dtype) - self.unembed_bias.mean(dtype=self.dtype)


def _only(pattern: Float[Tensor, "heads pos pos"], heads: Sequence[int]) -> Float[Tensor, "heads pos pos"]:
    kept = torch.zeros_like(pattern)
    kept[list(heads)] = pattern[list(heads)]
    return kept


def _layer(lm: LanguageModel, layer: int, seen: "_Seen", dtype: torch.dtype) -> FrozenLayer:
    """One block's linear maps from what its norms read and its patterns were."""
    where = norms(lm, layer)
    before = frozen_norm(where.before_attention, seen.inputs[where.before_attention], dtype)
    weights = value_output(lm, layer, dtype)
    pattern = seen.patterns[layer].to(dtype)
    constant = _constant(lm, layer, before, dtype)
    output, query_scale = weights.output, None
    if where.after_attention is not None:
        after = frozen_norm(where.after_attention, seen.inputs[where.after_attention], dtype)
        output, query_scale = after.fold(output.T).T, after.scale
        if constant is not None:
            constant = after.fold(constant[None])[0] * query_scale[:, None]
    scaled = pattern * before.scale[None, None, :]
    if query_scale is not None:
        scaled = scaled * query_scale[None, :, None]
    return FrozenLayer(
        output=output,
        pattern=scaled,
        value=before.fold(weights.value),
        constant=None if constant is None else constant.expand(pattern.shape[-1], -1),
        mlp_norm=frozen_norm(where.before_mlp, seen.inputs[where.before_mlp], dtype),
    )


def _constant(
    lm: LanguageModel, layer: int, before: FrozenNorm, dtype: torch.dtype
) -> Float[Tensor, " d_model"] | None:
    """What attention gives for a stream of zeros under held scales.

    Each query's attention sums to 1, so a constant value goes through any pattern unchanged.
    """
    weights = value_output(lm, layer, dtype)
    value = weights.value_bias
    if before.bias is not None:
        read = weights.value @ before.bias
        value = read if value is None else read + value
    if value is None:
        return weights.output_bias
    d_head = lm.width(f"z.{layer}") // int(lm.hf.config.num_attention_heads)
    shared = weights.output.shape[1] // value.shape[0]  # query heads of each key-value head
    z = value.view(-1, 1, d_head).expand(-1, shared, -1).reshape(-1)
    constant = weights.output @ z
    return constant if weights.output_bias is None else constant + weights.output_bias


@dataclass
class _Seen:
    """Inputs of norms and attention patterns of one pass."""

    inputs: dict[nn.Module, Float[Tensor, "pos d_model"]]
    patterns: list[Float[Tensor, "heads pos pos"]]


@contextmanager
def _seen(lm: LanguageModel) -> Iterator[_Seen]:
    """Keep what norms read and attention patterns are during the passes inside."""
    seen = _Seen({}, [])
    with ExitStack() as undo:
        for layer in range(lm.n_layers):
            for module in norms(lm, layer):
                if module is not None:
                    hook = module.register_forward_pre_hook(
                        lambda m, args: seen.inputs.__setitem__(m, args[0][0])
                    )
                    undo.callback(hook.remove)
            attention = attention_of(lm.blocks[layer])
            setattr(attention, KEPT, seen.patterns)
            undo.callback(delattr, attention, KEPT)
        lm.hf.set_attn_implementation(RECORDING)
        undo.callback(lm.hf.set_attn_implementation, ATTENTION)
        yield seen


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The library's attention, whose patterns go to the module's list."""
    getattr(module, KEPT).append(patterns(module, query, key, attention_mask, **options)[0])
    return attend(module, query, key, value, attention_mask, **options)


AttentionInterface.register(RECORDING, _record)
AttentionMaskInterface.register(RECORDING, eager_mask)

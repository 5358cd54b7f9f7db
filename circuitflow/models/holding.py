"""Holding attention patterns and norm scales at what they were in one run, while everything else responds.

:mod:`circuitflow.models.linear` changes derivatives and never values; here the values of a later run change: it
mixes with the patterns, and divides by the scales, of an earlier one over the same tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from circuitflow.models.attention import ATTENTION, attend, patterns
from circuitflow.models.modules import attention_of, norms_of, replaced
from circuitflow.models.running import LanguageModel

HELD = "circuitflow_held"
"""Name of the attention function that records or holds, and the attribute that tells a module which."""


@dataclass
class Recorded:
    """Patterns and norm scales of one run, by the number of the module in the model."""

    patterns: dict[int, Float[Tensor, "batch heads pos pos"]] = field(default_factory=dict)
    scales: dict[int, list[Tensor]] = field(default_factory=dict)
    """1/σ of every norm; RMS norms may take several reciprocal roots, in the order in which they do."""


@contextmanager
def recording(lm: LanguageModel) -> Iterator[Recorded]:
    """Record patterns and scales of the one pass of the model made inside; its values stay the same."""
    found = Recorded()

    def keep(number: int) -> Callable[..., Any]:
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
        ) -> Any:
            found.patterns[number] = patterns(module, query, key, *rest, **more).to(value.dtype)
            return attend(module, query, key, value, *rest, **more)

        return attention

    with _attention(lm, keep), ExitStack() as changes:
        for number, norm in enumerate(norms_of(lm.hf)):
            found.scales[number] = []
            changes.enter_context(replaced(norm, _recorded_norm(norm, found.scales[number])))
        yield found


@contextmanager
def holding(lm: LanguageModel, recorded: Recorded, *, attention: bool, norms_too: bool) -> Iterator[None]:
    """Let every pass inside, ``lm.unembed`` included, use recorded patterns, recorded norm scales, or both.

    Passes must be over the recorded tokens (any number of copies of a single prompt), whole positions at a time.
    """

    def hold(number: int) -> Callable[..., Any]:
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
        ) -> Any:
            pattern = recorded.patterns[number]
            repeated = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
            return torch.matmul(pattern, repeated).transpose(1, 2).contiguous(), None

        return attention

    with ExitStack() as changes:
        if attention:
            changes.enter_context(_attention(lm, hold))
        if norms_too:
            for number, norm in enumerate(norms_of(lm.hf)):
                changes.enter_context(replaced(norm, _held_norm(norm, recorded.scales[number])))
        yield


def _dispatch(module: nn.Module, *args: Any, **more: Any) -> Any:
    return getattr(module, HELD)(module, *args, **more)


AttentionInterface.register(HELD, _dispatch)
AttentionMaskInterface.register(HELD, eager_mask)


@contextmanager
def _attention(lm: LanguageModel, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Another attention function for every block, made from the block's number."""
    modules = [attention_of(block) for block in lm.blocks]
    for number, module in enumerate(modules):
        setattr(module, HELD, make(number))
    lm.hf.set_attn_implementation(HELD)
    try:
        yield
    finally:
        lm.hf.set_attn_implementation(ATTENTION)
        for module in modules:
            delattr(module, HELD)


class _Roots(TorchFunctionMode):
    """Records the reciprocal roots by which RMS norms scale, or answers with recorded ones."""

    def __init__(self, seen: list[Tensor], held: bool) -> None:
        super().__init__()
        self._seen, self._held, self._next = seen, held, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in (torch.rsqrt, torch.Tensor.rsqrt):
            return func(*args, **(kwargs or {}))
        if self._held:
            self._next += 1
            return self._seen[self._next - 1]
        self._seen.append(func(*args, **(kwargs or {})))
        return self._seen[-1]


def _recorded_norm(norm: nn.Module, seen: list[Tensor]) -> Callable[..., Tensor]:
    forward = norm.forward
    if isinstance(norm, nn.LayerNorm):
        eps = norm.eps

        def layer_norm(x: Tensor) -> Tensor:
            seen[:] = [torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)]
            return forward(x)

        return layer_norm

    def rms_norm(x: Tensor) -> Tensor:
        seen.clear()
        with _Roots(seen, held=False):
            return forward(x)

    return rms_norm


def _held_norm(norm: nn.Module, seen: list[Tensor]) -> Callable[..., Tensor]:
    forward = norm.forward
    if isinstance(norm, nn.LayerNorm):
        weight, bias = norm.weight, norm.bias

        def layer_norm(x: Tensor) -> Tensor:
            scaled = (x - x.mean(-1, keepdim=True)) * seen[0] * weight
            return scaled if bias is None else scaled + bias  # type: ignore[redundant-expr]

        return layer_norm

    def rms_norm(x: Tensor) -> Tensor:
        with _Roots(seen, held=True):
            return forward(x)

    return rms_norm

"""Forward passes whose backward follows other rules: parts of the model treated as fixed scalings.

Values never change; only what autograd sees does. With everything frozen that can be (:data:`LINEAR`) the model is,
for its gradients, one affine map of the stream, so that gradient × input plus the bias paths give its output exactly.
It serves RelP (Rezaei Jafari et al. 2025: relevance propagation written as a changed backward pass) and attribution
graphs (frozen attention and norms).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuitflow.models.attention import RULE
from circuitflow.models.modules import attention_of, norms_of, replaced
from circuitflow.models.running import LanguageModel

CHOICES = {
    "norms": ("free", "frozen"),
    "activations": ("free", "frozen"),
    "products": ("free", "half"),
    "attention": ("free", "frozen", "half"),
}

LIMIT_AT = 1e-4
"""Where the slope φ(x)/x of an activation at x = 0 is taken."""


@dataclass(frozen=True)
class Rules:
    """How each kind of part is differentiated; "free" is the true derivative.

    The soft-caps of Gemma 2 are no part of this: that of attention scores is cut off by frozen attention, and that of
    the logits comes after the final norm and stays as it is.
    """

    norms: str = "free"
    """"frozen": the scale 1/σ is a constant, in every norm of the model (post-norms, q and k norms, the final one)."""
    activations: str = "free"
    """"frozen": φ(x) = x·(φ(x)/x) with the ratio a constant."""
    products: str = "free"
    """"half": the product of a gated MLP, a·b, passes half of its gradient to each factor, the other being constant."""
    attention: str = "free"
    """"frozen": patterns are constants. "half": the product of pattern and values passes half to each."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) not in CHOICES[field.name]:
                raise ValueError(
                    f"rule {field.name} is {value!r}; expected {' or '.join(CHOICES[field.name])}"
                )


RELP = Rules(norms="frozen", activations="frozen", products="half", attention="free")
"""The rules of relevance patching."""
LINEAR = Rules(norms="frozen", activations="frozen", products="half", attention="frozen")
"""Everything frozen: with respect to the stream the model is affine."""


@contextmanager
def linearised(lm: LanguageModel, rules: Rules) -> Iterator[None]:
    """Let every forward pass of the model inside, ``lm.unembed`` included, be differentiated by other rules.

    Values stay the same bit for bit. Not for two threads at once on one model.
    """
    with ExitStack() as changes:
        if rules.norms == "frozen":
            for module in norms_of(lm.hf):
                changes.enter_context(replaced(module, _frozen_norm(module)))
        for block in lm.blocks:
            mlp = block.get_submodule("mlp")
            if rules.activations == "frozen":
                changes.enter_context(replaced(_activation(mlp), _frozen_activation(_activation(mlp))))
            if rules.products == "half" and hasattr(mlp, "up_proj"):
                changes.enter_context(_halved(mlp))
            if rules.attention != "free":
                changes.enter_context(_marked(attention_of(block), rules.attention))
        yield


def with_value(value: Tensor, path: Tensor) -> Tensor:
    """A tensor equal to ``value`` whose derivative is that of ``path``."""
    return value.detach() + (path - path.detach())


def _activation(mlp: nn.Module) -> nn.Module:
    found = getattr(mlp, "act_fn", None) or getattr(mlp, "act", None)
    if not isinstance(found, nn.Module):
        raise TypeError(f"{type(mlp).__name__} has no activation module that this library knows")
    return found


class _ConstantScale(TorchFunctionMode):
    """Makes the reciprocal root, by which RMS norms scale, a constant."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.detach() if func in (torch.rsqrt, torch.Tensor.rsqrt) else result


def _frozen_norm(module: nn.Module) -> Callable[..., Tensor]:
    forward = module.forward
    if isinstance(module, nn.LayerNorm):
        norm = module

        def layer_norm(x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps).detach()
            path = centred * scale * norm.weight
            return with_value(forward(x), path if norm.bias is None else path + norm.bias)  # type: ignore[redundant-expr]

        return layer_norm

    def rms_norm(x: Tensor) -> Tensor:
        with _ConstantScale():
            return forward(x)

    return rms_norm


def _frozen_activation(module: nn.Module) -> Callable[..., Tensor]:
    forward = module.forward

    def scaled(x: Tensor) -> Tensor:
        with torch.no_grad():
            value = forward(x)
            limit = forward(x.new_full((1,), LIMIT_AT)) / LIMIT_AT
            ratio = torch.where(x == 0, limit, value / x)
        return with_value(value, x * ratio)

    return scaled


@contextmanager
def _halved(mlp: nn.Module) -> Iterator[None]:
    """Let the input of the down projection, activation(gate)·up, pass half of its gradient to each factor."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.__setitem__(name, output)

    def product(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate, up = seen.pop("gate"), seen.pop("up")
        return (with_value(args[0], half_product(gate, up)),)

    hooks = [
        _activation(mlp).register_forward_hook(keep("gate")),
        mlp.get_submodule("up_proj").register_forward_hook(keep("up")),
        mlp.get_submodule("down_proj").register_forward_pre_hook(product),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def half_product(first: Tensor, second: Tensor) -> Tensor:
    """first·second, as half of each factor times the other held constant."""
    return 0.5 * (first * second.detach() + first.detach() * second)


@contextmanager
def _marked(attention: nn.Module, rule: str) -> Iterator[None]:
    setattr(attention, RULE, rule)
    try:
        yield
    finally:
        delattr(attention, RULE)

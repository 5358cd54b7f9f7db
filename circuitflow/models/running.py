"""Running a language model: one forward pass that records, replaces, starts and stops at any site."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from circuitflow.models.architectures import Architecture, architecture_of, check_site, site_width
from circuitflow.models.attention import ATTENTION
from circuitflow.models.precision import keep_double
from circuitflow.models.sites import Site, parse_site

Change = Callable[[Tensor], Tensor]
"""Takes a site's value (batch, pos, width) and gives the value that the model goes on with."""


class LanguageModel:
    """A causal language model of a known architecture with its tokenizer.

    It takes ``hf`` over: evaluation mode, frozen weights, the attention of
    :mod:`circuitflow.models.attention`, and true float64 arithmetic if it is a float64 model.
    """

    def __init__(self, hf: Any, tokenizer: Any, arch: Architecture | None = None) -> None:
        self.hf = hf.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.arch = arch or architecture_of(hf.config)
        self.n_layers = int(hf.config.num_hidden_layers)
        self.d_model = int(hf.config.hidden_size)
        self.dtype: torch.dtype = hf.dtype
        self.device: torch.device = hf.device
        self.blocks: list[nn.Module] = list(hf.get_submodule(self.arch.blocks))
        self._final_norm = hf.get_submodule(self.arch.final_norm)
        self._unembed = hf.get_submodule(self.arch.unembed)
        self._softcap: float | None = getattr(hf.config, "final_logit_softcapping", None)
        hf.set_attn_implementation(ATTENTION)
        if self.dtype == torch.float64:
            keep_double(hf)

    def width(self, site: str) -> int:
        """Width of the vector at a site: d_model, or n_heads · d_head for z."""
        return site_width(self.check_site(site), self.hf.config)

    def check_site(self, site: str) -> Site:
        """The site of this name.

        :raises UserError: it is not a site, or this model does not have it.
        """
        parsed = parse_site(site)
        check_site(parsed, self.arch, self.n_layers)
        return parsed

    def unembed(
        self, resid: Float[Tensor, "... d_model"], tokens: Int[Tensor, " vocab"] | None = None
    ) -> Float[Tensor, "... vocab"]:
        """Logits from the output of the last block: the model's own final norm, unembedding and soft-cap.

        :param tokens: the only logits wanted; by default those of the whole vocabulary.
        """
        normed, unembed = self._final_norm(resid), self._unembed
        if tokens is None:
            logits = unembed(normed)
        else:
            bias = None if unembed.bias is None else unembed.bias[tokens]
            logits = nn.functional.linear(normed, unembed.weight[tokens], bias)
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


@dataclass
class Run:
    """What a pass gave."""

    sites: dict[str, Float[Tensor, "batch pos width"]]
    """Value at each captured site, after any replacement there."""
    last: Float[Tensor, "batch pos d_model"] | None
    """Output of the model's last block, for ``LanguageModel.unembed``; None if the pass ended before it."""


def run(
    lm: LanguageModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"],
    *,
    capture: Sequence[str] = (),
    replace: Mapping[str, Change] | None = None,
    start: tuple[str, Float[Tensor, "batch pos d_model"]] | None = None,
    stop_at: str | None = None,
    grad: bool = False,
) -> Run:
    """One forward pass of the blocks, without a cache; values at masked positions mean nothing.

    :param mask: True at real tokens; padding is on the right.
    :param capture: sites to return.
    :param replace: functions that change the value at a site; what a site captures is the changed value.
    :param start: ``("resid.L", x)`` or ``("embed", x)``: the blocks up to there are skipped and the pass goes on
        from x. Masks, position tables and sliding windows stay the model's own.
    :param stop_at: the pass ends after this site. By default that is the deepest captured site, or the last block
        if nothing is captured. For logits as well as captured values ask for the last block's ``resid``.
    :param grad: record gradients with respect to activations (weights stay frozen). The value at ``start`` (or at
        embed), and replaced values that carry no gradient, become leaves; ``torch.autograd.grad`` works with
        respect to every captured tensor.
    :raises UserError: the model has no such site.
    :raises ValueError: sites that this pass does not reach, padding on the left, or shapes that do not fit.
    """
    _check_shapes(lm, tokens, mask, start)
    this = _plan(lm, capture, replace or {}, start, stop_at, grad)
    with ExitStack() as hooks, torch.set_grad_enabled(grad):
        if start is not None:
            hooks.enter_context(_skipped(lm.blocks[: _blocks_before(this.first)]))
        for site in sorted(this.visited()):
            hooks.enter_context(_hooked(lm, site, this.visit))
        with suppress(_Stop):
            lm.hf.base_model(
                input_ids=tokens.to(lm.device), attention_mask=mask.to(lm.device), use_cache=False
            )
    return Run({name: this.captured[parse_site(name)] for name in capture}, this.last)


class _Stop(Exception):  # noqa: N818 - not an error: the pass has gone as far as it should
    """Ends a forward pass."""


@dataclass
class _Pass:
    """One forward pass: what to do at which site, and what was seen there."""

    capture: frozenset[Site]
    changes: dict[Site, Change]
    first: Site
    end: Site
    final: Site
    grad: bool
    captured: dict[Site, Tensor] = field(default_factory=dict)
    parts: dict[Site, Tensor] = field(default_factory=dict)
    last: Tensor | None = None

    def visited(self) -> set[Site]:
        """Every site where something happens."""
        sites = {*self.capture, *self.changes, self.end}
        for site in self.changes:
            if site.kind == "resid_mid":
                sites |= {Site("mlp", site.layer), Site("resid", site.layer)}
        return {*sites, self.first} if self.grad else sites

    def visit(self, site: Site, value: Tensor) -> Tensor:
        """Called with the value at a site; gives the value that the model goes on with."""
        value = self._rebuilt(site, value)
        if site in self.changes:
            value = self.changes[site](value)
        if self.grad and (site in self.changes or site == self.first) and not value.requires_grad:
            value = value.detach().requires_grad_()
        self.parts[site] = value
        if site in self.capture:
            self.captured[site] = value
        if site == self.final:
            self.last = value
        if site == self.end:
            raise _Stop
        return value

    def _rebuilt(self, site: Site, value: Tensor) -> Tensor:
        """The output of a block whose resid_mid was replaced.

        A hook can only change what the norm reads, while the block adds the MLP to the stream it had before.
        """
        middle = Site("resid_mid", site.layer)
        if site.kind == "resid" and middle in self.changes:
            return self.parts[middle] + self.parts[Site("mlp", site.layer)]
        return value


def _plan(
    lm: LanguageModel,
    capture: Sequence[str],
    replace: Mapping[str, Change],
    start: tuple[str, Tensor] | None,
    stop_at: str | None,
    grad: bool,
) -> _Pass:
    wanted = frozenset(lm.check_site(name) for name in capture)
    changes = {lm.check_site(name): change for name, change in replace.items()}
    final = Site("resid", lm.n_layers - 1)
    first = Site("embed") if start is None else lm.check_site(start[0])
    end = lm.check_site(stop_at) if stop_at is not None else max(wanted, default=final)
    missed = sorted(site for site in {*wanted, *changes} if not first <= site <= end)
    if missed or end < first:
        raise ValueError(
            f"the pass from {first} to {end} does not reach {', '.join(map(str, missed)) or end}"
        )
    if start is not None:
        changes[first] = _going_on_from(start[1].to(lm.device, lm.dtype), changes.get(first))
    return _Pass(wanted, changes, first, end, final, grad)


def _going_on_from(value: Tensor, change: Change | None) -> Change:
    return (lambda _: value) if change is None else (lambda _: change(value))


def _blocks_before(site: Site) -> int:
    if site.kind not in ("embed", "resid"):
        raise ValueError(f"a pass can start from embed or from a block's output, not from {site}")
    return 0 if site.layer is None else site.layer + 1


def _check_shapes(lm: LanguageModel, tokens: Tensor, mask: Tensor, start: tuple[str, Tensor] | None) -> None:
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)} must both be (batch, pos)"
        )
    if start is not None and start[1].shape != (*tokens.shape, lm.d_model):
        raise ValueError(f"start value {tuple(start[1].shape)} must be {(*tokens.shape, lm.d_model)}")
    real = mask.bool()
    if not bool(real[:, 0].all()) or bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ValueError("every row of the mask must be real tokens followed by padding")


@contextmanager
def _skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks hand their input on, so that the model's own loop (masks, position tables) passes them by."""
    for block in blocks:
        block.forward = _identity
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _identity(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


@contextmanager
def _hooked(lm: LanguageModel, site: Site, visit: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
    path, side = lm.arch.place(site)
    module = lm.blocks[site.layer or 0].get_submodule(path)

    def on_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (visit(site, args[0]), *args[1:])

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        # Attention modules return a tuple; blocks and MLPs return the tensor itself.
        return (visit(site, output[0]), *output[1:]) if isinstance(output, tuple) else visit(site, output)

    hook = (
        module.register_forward_pre_hook(on_input)
        if side == "input"
        else module.register_forward_hook(on_output)
    )
    try:
        yield
    finally:
        hook.remove()

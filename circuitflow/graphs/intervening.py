"""One prompt through the real model with some features of its transcoders held at other values.

The model's MLPs stay what they are: a feature that is held at a value adds (value − its activation) · W_dec to the
sites that it writes. What may respond is chosen: attention patterns and norm scales can be held at those of the
untouched prompt, and so can the MLPs up to a layer (constrained patching, Ameisen et al. 2025).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.family import Family
from circuitflow.errors import UserError
from circuitflow.models.holding import Recorded, holding, recording
from circuitflow.models.running import LanguageModel, run
from circuitflow.models.sites import layer_of

OPEN = -1
"""``up_to`` of an intervention to which every MLP responds."""


@dataclass(frozen=True)
class Held:
    """A feature (of the member that reads ``layer``) that has one activation at one position, whatever comes in."""

    layer: int
    position: int
    feature: int
    value: float


@dataclass(frozen=True)
class Mode:
    """What responds to an intervention."""

    frozen_attention: bool = True
    frozen_norms: bool = True
    up_to: int = OPEN
    """MLPs of the layers 0 … up_to give what they gave on the untouched prompt (and what a transcoder's skip
    connection passes on of a changed input), so that effects run on through later MLPs alone; held features then
    change from their activation on the untouched prompt. :data:`OPEN`: all respond."""


@dataclass(frozen=True)
class Outcome:
    """What a pass gave."""

    logits: Float[Tensor, " vocab"]
    """At the last position, before any soft-cap."""
    read: Mapping[int, Float[Tensor, "pos d_model"]]
    """What every member reads, by layer."""


class Prompt:
    """A prompt, its untouched run, and runs of it with features held."""

    def __init__(self, lm: LanguageModel, family: Family, token_ids: Sequence[int]) -> None:
        self.lm, self.family = lm, family
        self.tokens = torch.tensor([list(token_ids)], device=lm.device)
        self.mask = torch.ones_like(self.tokens, dtype=torch.bool)
        self.positions = torch.arange(len(token_ids), device=lm.device)
        self.members = {layer_of(member.reads[0]): number for number, member in enumerate(family.members)}
        self._mlp: dict[int, Tensor] = {}
        self._recorded: Recorded
        self.clean = self._untouched()
        self.codes = {layer: self._encode(layer, x) for layer, x in self.clean.read.items()}

    def activation(self, layer: int, position: int, feature: int) -> float:
        """A feature's activation on the untouched prompt; 0 where it is not active."""
        codes = self._codes_of(layer)
        self._check(layer, position, feature)
        here = slice(int(codes.offsets[position]), int(codes.offsets[position + 1]))
        found = codes.values[here][codes.features[here] == feature]
        return float(found[0]) if len(found) else 0.0

    def active_at(self, layer: int, feature: int) -> list[int]:
        """Positions at which a feature is active on the untouched prompt."""
        codes = self._codes_of(layer)
        self._check(layer, 0, feature)
        return [int(row) for row in codes.rows()[codes.features == feature]]

    def pre_activations(
        self, outcome: Outcome, features: Iterable[tuple[int, int, int]]
    ) -> Float[Tensor, " m"]:
        """x·W_enc + b_enc of some features (layer, position, feature) in a run."""
        found = []
        for layer, position, feature in features:
            member = self._member(layer)
            assert member.W_enc is not None
            x = outcome.read[layer][position].to(member.W_enc.dtype)
            found.append(x @ member.W_enc[feature] + member.b_enc[feature])
        return torch.stack(found) if found else self.clean.logits.new_empty(0)

    def run(self, held: Sequence[Held], mode: Mode) -> Outcome:
        """The prompt with features held; of two that hold one feature at one position the later counts.

        :raises UserError: there is no such feature, layer or position.
        """
        for one in held:
            self._check(one.layer, one.position, one.feature)
        values = {(one.layer, one.position, one.feature): one.value for one in held}
        last = {
            (layer, at, feature): Held(layer, at, feature, v) for (layer, at, feature), v in values.items()
        }
        this = _Pass(self, list(last.values()), mode)
        with holding(self.lm, self._recorded, attention=mode.frozen_attention, norms_too=mode.frozen_norms):
            return self._pass(this.changes())

    def _untouched(self) -> Outcome:
        def keep(layer: int) -> Callable[[Tensor], Tensor]:
            def change(value: Tensor) -> Tensor:
                self._mlp[layer] = value
                return value

            return change

        with recording(self.lm) as self._recorded:
            return self._pass({f"mlp.{layer}": keep(layer) for layer in range(self.lm.n_layers)})

    def _pass(self, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Outcome:
        reads = [f"mlp_in.{layer}" for layer in self.members]
        last = f"resid.{self.lm.n_layers - 1}"
        found = run(self.lm, self.tokens, self.mask, capture=[*reads, last], replace=changes)
        normed = self.lm.hf.get_submodule(self.lm.arch.final_norm)(found.sites[last])
        logits = self.lm.hf.get_submodule(self.lm.arch.unembed)(normed[:, -1])[0]
        return Outcome(logits, {layer: found.sites[f"mlp_in.{layer}"][0] for layer in self.members})

    def _encode(self, layer: int, x: Float[Tensor, "pos d_model"]) -> Codes:
        return self._member(layer).encode(x, self.positions)

    def _member(self, layer: int) -> Dictionary:
        return self.family.members[self.members[layer]]

    def _codes_of(self, layer: int) -> Codes:
        if layer not in self.members:
            known = ", ".join(map(str, self.members))
            raise UserError(f"Layer {layer} has no transcoder; those with one are {known}.")
        return self.codes[layer]

    def _check(self, layer: int, position: int, feature: int) -> None:
        codes = self._codes_of(layer)
        if not 0 <= position < codes.n:
            raise UserError(
                f"Feature {feature} of layer {layer} cannot be held at position {position}: the prompt has {codes.n} "
                "tokens, counted from 0."
            )
        if not 0 <= feature < codes.d_dict:
            raise UserError(
                f"Feature {feature} of layer {layer} does not exist: its transcoder has {codes.d_dict} features, "
                "counted from 0."
            )


class _Pass:
    """One run: what it adds to the sites as it goes."""

    def __init__(self, prompt: Prompt, held: Sequence[Held], mode: Mode) -> None:
        self._prompt, self._mode = prompt, mode
        self._held: dict[int, list[Held]] = {}
        for one in held:
            self._held.setdefault(one.layer, []).append(one)
        self._added: dict[str, Tensor] = {}
        self._skipped: dict[str, Tensor] = {}

    def changes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What is done at which site of the model."""
        layers = range(self._prompt.lm.n_layers)
        reads = {f"mlp_in.{layer}": self._reader(layer) for layer in self._prompt.members}
        return reads | {f"mlp.{layer}": self._writer(layer) for layer in layers}

    def _reader(self, layer: int) -> Callable[[Tensor], Tensor]:
        def read(value: Tensor) -> Tensor:
            prompt, member = self._prompt, self._prompt._member(layer)
            follows = layer <= self._mode.up_to
            if layer in self._held:
                codes = prompt.codes[layer] if follows else prompt._encode(layer, value[0])
                self._add(self._added, member, layer, self._delta(layer, codes))
            if member.W_skip is not None and follows:
                moved = (value[0] - prompt.clean.read[layer]).to(member.W_skip.dtype) @ member.W_skip.T
                self._add(self._skipped, member, layer, moved)
            return value

        return read

    def _delta(self, layer: int, codes: Codes) -> Float[Tensor, "pos d_out"]:
        """Σ (value − activation) · W_dec over the layer's held features."""
        held, member = self._held[layer], self._prompt._member(layer)
        features = torch.tensor(sorted({one.feature for one in held}), device=codes.features.device)
        place = {int(feature): column for column, feature in enumerate(features)}
        now, change = codes.columns(features), torch.zeros_like(codes.columns(features))
        for one in held:
            at = one.position, place[one.feature]
            change[at] = one.value - now[at]
        return change.to(member.W_dec.dtype) @ member.W_dec[features]

    def _add(self, to: dict[str, Tensor], member: Dictionary, layer: int, delta: Tensor) -> None:
        width = member.d_model // len(member.writes)
        for site, part in zip(member.writes, delta.split(width, dim=1), strict=True):
            to[site] = to[site] + part if site in to else part

    def _writer(self, layer: int) -> Callable[[Tensor], Tensor]:
        def write(value: Tensor) -> Tensor:
            site = f"mlp.{layer}"
            if layer <= self._mode.up_to:
                value = self._prompt._mlp[layer]
                if site in self._skipped:
                    value = value + self._skipped[site].to(value.dtype)
            return value + self._added[site].to(value.dtype) if site in self._added else value

        return write

"""Training dictionaries that reconstruct together (cross-layer transcoders), and ones with a skip connection."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.gradients import Weights
from circuitflow.dictionaries.objective import Context, Finished, Gradients, Member, Objective, Part, Step


@dataclass(frozen=True)
class Skipping:
    """An objective whose reconstruction is added to a linear map of what is read: ŷ = f·W_dec + b_dec + W_skip·x."""

    inner: Objective
    d_in: int
    d_out: int

    @property
    def select(self) -> str:
        """That of the features."""
        return self.inner.select

    @property
    def unit_decoder(self) -> bool:
        """That of the features."""
        return self.inner.unit_decoder

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """W_skip, 0 at first, besides those of the features."""
        return {**self.inner.extra_weights(d_dict), "W_skip": torch.zeros(self.d_out, self.d_in)}

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        """Those of the features."""
        return self.inner.tracked(d_dict)

    def step(
        self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context, y: Tensor | None = None
    ) -> Step:
        """Loss and gradients of one batch: features reconstruct what the skip connection leaves over."""
        left = (x if y is None else y) - x @ weights["W_skip"].T
        step = self.inner.step(weights, x, context, left)
        assert step.cotangent is not None
        return replace(step, gradients=step.gradients | {"W_skip": step.cotangent.T @ x})

    def finish(self, weights: Weights) -> Finished:
        """The features' weights and W_skip."""
        done = self.inner.finish(weights)
        return replace(done, weights={**done.weights, "W_skip": weights["W_skip"]})


@dataclass(frozen=True)
class Joint:
    """Several kinds of one dictionary each: member m reads the m-th of the inputs and adds to all outputs from some on.

    Its weights are those of the members under ``{m}.{name}``, with W_dec (d_dict, outputs written · d), and one
    ``b_dec`` (outputs · d) for all. Loss: Σ_s mean ‖y_s − ŷ_s‖² plus what each member's kind adds to it.
    """

    members: tuple[Member, ...]
    d: int
    """Width of every input and output."""
    first: tuple[int, ...]
    """The first output that each member writes; it writes all that follow."""
    outputs: int
    """Outputs, side by side in ŷ."""
    d_dict: int
    """Features of each member."""
    skip: bool = False
    """Whether each member passes its input on, by a linear map, to the first output that it writes."""

    @property
    def select(self) -> str:
        """That of the members."""
        return self.members[0].select

    @property
    def unit_decoder(self) -> bool:
        """That of the members."""
        return self.members[0].unit_decoder

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """Those of every member."""
        return {
            f"{m}.{name}": tensor
            for m, member in enumerate(self.members)
            for name, tensor in {**member.extra_weights(d_dict), **self._skip_weights()}.items()
        }

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        """Those of every member."""
        return {
            f"{m}.{name}": tensor
            for m, member in enumerate(self.members)
            for name, tensor in member.tracked(d_dict).items()
        }

    def step(
        self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context, y: Tensor | None = None
    ) -> Step:
        """Loss and gradients of one batch.

        :param x: the members' inputs side by side.
        :param y: the outputs side by side.
        """
        assert y is not None, "what is written is not what is read"
        residual, inputs = weights["b_dec"] - y, [part.contiguous() for part in x.split(self.d, dim=1)]
        dead = context.dead.split(self.d_dict)
        closes = []
        for m, member in enumerate(self.members):
            own, at = self.own(weights, m), self.first[m] * self.d
            opened = member.open(own, inputs[m], replace(context, dead=dead[m]))
            residual[:, at:] += opened.decoded
            if self.skip:
                residual[:, at : at + self.d] += inputs[m] @ own["W_skip"].T
            closes.append(opened.close)
        reconstruction = residual.square().sum() / x.shape[0]
        cotangent = residual * (2 / x.shape[0])
        gradients, parts = {"b_dec": cotangent.sum(0)}, list[Part]()
        for m, close in enumerate(closes):
            at = self.first[m] * self.d
            pulled = cotangent[:, at:].contiguous()
            part = close(residual[:, at:].clone(), pulled)
            parts.append(part)
            gradients |= _named(m, part.gradients)
            if self.skip:
                gradients[f"{m}.W_skip"] = pulled[:, : self.d].T @ inputs[m]
        return _joined(parts, gradients, reconstruction, cotangent)

    def finish(self, weights: Weights) -> Finished:
        """Not for several.

        :raises TypeError: always; see :meth:`finish_members`.
        """
        raise TypeError("several dictionaries are finished by finish_members")

    def finish_members(self, weights: Weights) -> list[Finished]:
        """Every member as inference uses it; the part of b_dec of an output is with the last that starts there."""
        finished, width = [], weights["b_dec"].shape[0]
        for m, member in enumerate(self.members):
            at = self.first[m] * self.d
            bias = torch.zeros_like(weights["b_dec"])
            # Outputs before those of the first member have no other owner.
            until = self.first[m + 1] * self.d if m + 1 < len(self.members) else width
            bias[at:until] = weights["b_dec"][at:until]
            done = member.finish({**self.own(weights, m), "b_dec": bias[at:]})
            if self.skip:
                skip = weights["b_dec"].new_zeros(width - at, self.d)
                skip[: self.d] = weights[f"{m}.W_skip"]
                done = replace(done, weights={**done.weights, "W_skip": skip})
            finished.append(done)
        return finished

    def own(self, weights: Weights, member: int) -> dict[str, Tensor]:
        """The weights of one member under their own names."""
        start = f"{member}."
        return {name.removeprefix(start): t for name, t in weights.items() if name.startswith(start)}

    def _skip_weights(self) -> dict[str, Tensor]:
        return {"W_skip": torch.zeros(self.d, self.d)} if self.skip else {}


def _named(member: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{member}.{name}": tensor for name, tensor in tensors.items() if name != "b_dec"}


def _joined(parts: list[Part], gradients: Gradients, reconstruction: Tensor, cotangent: Tensor) -> Step:
    tracked: dict[str, Tensor] = {}
    for m, part in enumerate(parts):
        tracked |= _named(m, part.tracked)
    return Step(
        gradients,
        torch.cat([part.fired for part in parts]),
        reconstruction,
        torch.stack([part.auxiliary for part in parts]).sum(),
        sum(part.active for part in parts),
        tracked,
        cotangent,
    )

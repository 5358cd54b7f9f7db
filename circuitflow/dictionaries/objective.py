"""What a trainable kind of dictionary has to provide: the seam between the trainer and the family of kinds.

The trainer owns the data order, the optimizer, the learning rate, decoder norms, dead counters and saving. An
objective turns weights and one batch into explicit gradients. It keeps no state: what a kind learns or tracks
besides the common weights (thresholds, gates, running thresholds) are tensors in ``weights``, saved and
resumed with the others.

What is reconstructed is the batch itself (x̂ ≈ x), or for a transcoder what another site holds (ŷ ≈ y): everything
that is said of x and x̂ in a loss is then about y and ŷ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from circuitflow.dictionaries.gradients import Weights

Gradients = dict[str, Tensor]
"""∂loss/∂weight by name of the weight."""

COMMON = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Weights that every trained kind learns."""


@dataclass(frozen=True)
class Context:
    """What an objective may know of the run besides weights and batch."""

    dead: Bool[Tensor, " d_dict"]
    """Features that have not been active for long."""
    done: float
    """Share of the training steps already taken."""
    sparsity: float = 1.0
    """Factor of sparsity penalties: rises from 0 to 1 while they are warmed up."""


@dataclass(frozen=True)
class Finished:
    """A kind's weights in the form that inference uses, for normalised vectors.

    Pre-activations are x·W_encᵀ + b_enc; a selected feature passes its pre-activation on. Decoder rows have norm
    1 (rows of norm 0 excepted).
    """

    weights: Weights
    """The four common weights, and W_skip where there is a skip connection."""
    settings: Mapping[str, Any]
    """Plain numbers of the selection rule: k …"""
    extra: Mapping[str, Tensor]
    """Tensors (d_dict,) of the selection rule, in the unit of feature values: threshold …"""


@dataclass(frozen=True)
class Step:
    """Gradients of one batch and what the log says of it. Losses are means over tokens; inputs have mean ‖x‖² = 1."""

    gradients: Gradients
    fired: Bool[Tensor, " d_dict"]
    """Features active in this batch."""
    reconstruction: Float[Tensor, ""]
    """Mean ‖x − x̂‖²."""
    auxiliary: Float[Tensor, ""]
    """Everything else in the loss: AuxK, sparsity penalties."""
    active: int
    """Active features, counted over the batch."""
    tracked: Mapping[str, Tensor] = field(default_factory=dict)
    """New values of the tensors that the kind tracks; the trainer stores them after its update."""
    cotangent: Float[Tensor, "batch d_out"] | None = None
    """∂loss/∂x̂, without auxiliary losses: what else adds to x̂ (a skip connection) learns from it."""


@dataclass(frozen=True)
class Part:
    """Gradients and counts of one dictionary of several that reconstruct together; their b_dec is shared, not here."""

    gradients: Gradients
    fired: Bool[Tensor, " d_dict"]
    auxiliary: Float[Tensor, ""]
    active: int
    tracked: Mapping[str, Tensor] = field(default_factory=dict)


Close = Callable[[Tensor, Tensor], Part]
"""From x̂ − x and ∂loss/∂x̂, both (batch, d_out), to what follows for one dictionary."""


@dataclass(frozen=True)
class Opened:
    """A step between decoding and learning of the error, to which other dictionaries may contribute."""

    decoded: Float[Tensor, "batch d_out"]
    """Σ_i f_i·W_dec[i], the caller's to overwrite."""
    close: Close


def solo(opened: Opened, b_dec: Float[Tensor, " d_out"], y: Float[Tensor, "batch d_out"]) -> Step:
    """The whole step of a dictionary that reconstructs ``y`` by itself."""
    residual = opened.decoded.add_(b_dec).sub_(y)
    cotangent = residual * (2 / y.shape[0])
    reconstruction = residual.square().sum() / y.shape[0]
    part = opened.close(residual, cotangent)
    gradients = part.gradients | {"b_dec": cotangent.sum(0)}
    return Step(gradients, part.fired, reconstruction, part.auxiliary, part.active, part.tracked, cotangent)


@runtime_checkable
class Kind(Protocol):
    """What every trainable kind says of itself."""

    @property
    def select(self) -> str:
        """Name of the selection rule of the finished dictionary."""
        ...

    @property
    def unit_decoder(self) -> bool:
        """Whether the trainer keeps decoder rows at norm 1; a kind whose penalty knows their norms leaves them free."""
        ...

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """Tensors (d_dict, …) that the kind learns besides the four common ones, at their first values."""
        ...

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        """Tensors that the kind keeps track of without a gradient (a running threshold …), at their first values."""
        ...

    def finish(self, weights: Weights) -> Finished:
        """The weights as inference uses them, as learned so far; nothing is changed in place."""
        ...


@runtime_checkable
class Objective(Kind, Protocol):
    """One trainable kind with its settings."""

    def step(
        self,
        weights: Weights,
        x: Float[Tensor, "batch d_in"],
        context: Context,
        y: Float[Tensor, "batch d_out"] | None = None,
    ) -> Step:
        """Loss and gradients of every learned weight for one batch of normalised vectors.

        :param weights: the common weights, the kind's own, and what it tracks, by name.
        :param y: what is to be reconstructed; ``x`` itself by default.
        """
        ...


@runtime_checkable
class Member(Kind, Protocol):
    """A kind that can reconstruct together with other dictionaries: its step is cut where the errors are joined."""

    def open(self, weights: Weights, x: Float[Tensor, "batch d_in"], context: Context) -> Opened:
        """Encode and decode one batch of normalised vectors."""
        ...

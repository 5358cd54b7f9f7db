"""What a trainable kind of dictionary has to provide: the seam between the trainer and the family of kinds.

The trainer owns the data order, the optimizer, the learning rate, decoder norms, dead counters and saving. An
objective turns weights and one batch into explicit gradients. It keeps no state: what a kind learns or tracks
besides the common weights (thresholds, gates, running thresholds) are tensors in ``weights``, saved and
resumed with the others.
"""

from collections.abc import Mapping
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
    """The four common weights."""
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


@runtime_checkable
class Objective(Protocol):
    """One trainable kind with its settings."""

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

    def step(self, weights: Weights, x: Float[Tensor, "batch d_model"], context: Context) -> Step:
        """Loss and gradients of every learned weight for one batch of normalised vectors.

        :param weights: the common weights, the kind's own, and what it tracks, by name.
        """
        ...

    def finish(self, weights: Weights) -> Finished:
        """The weights as inference uses them, as learned so far; nothing is changed in place."""
        ...

"""What a trainable kind of dictionary has to provide: the seam between the trainer and the family of kinds.

The trainer owns the data order, the optimizer, the learning rate, decoder norms, dead counters and saving. An
objective turns weights and one batch into explicit gradients. It keeps no state: what a kind learns or tracks
besides the common weights (thresholds, gates, running thresholds) are tensors in ``weights``, saved and
resumed with the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from circuitflow.dictionaries.gradients import Weights

Gradients = dict[str, Tensor]
"""∂loss/∂weight by name of the weight."""


@dataclass(frozen=True)
class Context:
    """What an objective may know of the run besides weights and batch."""

    dead: Bool[Tensor, " d_dict"]
    """Features that have not been active for long."""
    done: float
    """Share of the training steps already taken, for penalties that are ramped up."""


@dataclass(frozen=True)
class Inference:
    """What a selection rule needs: plain numbers (k …), and tensors of shape (d_dict,) (thresholds …)."""

    settings: Mapping[str, Any]
    extra: Mapping[str, Tensor]


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


@runtime_checkable
class Objective(Protocol):
    """One trainable kind with its settings."""

    @property
    def select(self) -> str:
        """Name of the selection rule of the finished dictionary."""
        ...

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        """Tensors that the kind learns besides the four common ones, at their first values."""
        ...

    def step(self, weights: Weights, x: Float[Tensor, "batch d_model"], context: Context) -> Step:
        """Loss and gradients of every weight for one batch of normalised vectors."""
        ...

    def inference(self, weights: Weights, scale: float) -> Inference:
        """What the selection rule needs, as learned so far.

        :param scale: what values of features are multiplied by: 1 for normalised vectors, more once the
            normalisation is folded into the weights.
        """
        ...

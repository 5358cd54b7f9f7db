"""Settings of one dictionary as plain values: what the configuration's section ``dictionaries`` hands to the stage."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from circuitflow.errors import UserError, nearest


@dataclass(frozen=True)
class Training:
    """How a dictionary is trained; keys and meanings are those of the configuration."""

    epochs: float
    """Passes over the training rows."""
    batch: int
    """Tokens per step."""
    learning_rate: float
    """Peak learning rate of Adam, for inputs scaled to mean ‖x‖² = 1."""
    warmup: float
    """Share of the steps over which the learning rate rises."""
    decay: float
    """Share of the steps, at the end, over which it falls to zero."""
    auxk_weight: float
    """Weight of the auxiliary loss; 0 turns it off."""
    auxk: int | None
    """Dead features used per token; None is d_model / 2."""
    dead_after: int
    """Tokens without firing after which a feature counts as dead."""
    outlier_ratio: float | None
    """Tokens with a norm above ratio × median are left out; None keeps them."""
    skip_positions: tuple[int, ...]
    """Positions of a block that are left out."""
    buffer_rows: int
    """Rows shuffled together: bounds memory."""
    checkpoints: tuple[float, ...]
    """Shares of the training after which weights are kept, besides the end."""
    evaluate_every: int
    """Steps between held-out measurements."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Training":
        """From plain JSON values.

        :raises UserError: a key is unknown or missing.
        """
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise UserError(f"Key training.{key} is unknown; {nearest(key, names, limit=len(names))}.")
        if missing := [name for name in names if name not in values]:
            raise UserError(f"Key training.{missing[0]} is missing; give it a value.")
        sequences = {key: tuple(values[key]) for key in ("skip_positions", "checkpoints")}
        return cls(**{**values, **sequences})

    def checkpoint_steps(self, steps: int) -> frozenset[int]:
        """Step counts after which weights are kept, of a training of ``steps`` steps."""
        chosen = {max(1, round(share * steps)) for share in self.checkpoints}
        return frozenset(chosen - {steps})

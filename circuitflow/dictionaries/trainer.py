"""The inside of the training loop: weights, optimizer, schedule and dead counters, one batch at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.objective import Context, Objective, Step

BETAS = (0.9, 0.999)
MOMENTS = ("exp_avg", "exp_avg_sq")
FIRST_ENCODER_SCALE = 0.5  # encoder = half the decoder at first: .136 → .128 held-out FVU in a short run


class NonFiniteLossError(ArithmeticError):
    """The loss of a batch was NaN or infinite; the weights are still those from before it."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a linear warm-up, a plateau, a linear decay to zero over the last part."""

    peak: float
    steps: int
    warmup: float
    decay: float

    def at(self, done: int) -> float:
        """Learning rate of the step that follows ``done`` steps."""
        rise = (done + 1) / max(1.0, self.warmup * self.steps)
        fall = (self.steps - done) / max(1.0, self.decay * self.steps)
        return self.peak * min(1.0, rise, fall)


def first_weights(
    objective: Objective, d_model: int, d_dict: int, seed: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Random decoder rows of norm 1, the encoder along them, no biases, and what the objective adds.

    Drawn on the CPU, so that a seed means the same weights everywhere.
    """
    draw = torch.randn(d_dict, d_model, generator=torch.Generator().manual_seed(seed))
    decoder = draw / draw.norm(dim=1, keepdim=True)
    weights = {
        "W_enc": FIRST_ENCODER_SCALE * decoder,
        "b_enc": torch.zeros(d_dict),
        "W_dec": decoder,
        "b_dec": torch.zeros(d_model),
        **objective.extra_weights(d_dict),
    }
    return {name: tensor.to(device) for name, tensor in weights.items()}


class Trainer:
    """Takes training steps on normalised vectors (mean ‖x‖² = 1).

    Decoder rows keep norm 1: the part of their gradient along the row is taken out before the optimizer sees
    it, and rows are scaled back after its step. No random number is drawn, so :meth:`state` is all that a
    resumed run needs.
    """

    def __init__(
        self, objective: Objective, weights: dict[str, Tensor], schedule: Schedule, dead_after: int
    ) -> None:
        self.objective = objective
        self.weights = weights
        self.schedule = schedule
        self.done = 0
        d_dict = weights["W_dec"].shape[0]
        self.idle = torch.zeros(d_dict, dtype=torch.int64, device=weights["W_dec"].device)
        self._dead_after = dead_after
        self._optimizer = torch.optim.Adam(list(weights.values()), lr=schedule.peak, betas=BETAS, fused=True)

    @property
    def dead_share(self) -> float:
        """Share of features that have not been active for ``dead_after`` tokens."""
        return float((self.idle > self._dead_after).float().mean())

    def step(self, x: Float[Tensor, "batch d_model"]) -> Step:
        """Take one step.

        :raises NonFiniteLossError: the loss is NaN or infinite; nothing has been changed.
        """
        context = Context(self.idle > self._dead_after, self.done / self.schedule.steps)
        step = self.objective.step(self.weights, x, context)
        if not torch.isfinite(step.reconstruction + step.auxiliary):
            raise NonFiniteLossError
        self._update(step.gradients)
        self.idle += x.shape[0]
        self.idle[step.fired] = 0
        self.done += 1
        return step

    def state(self) -> dict[str, Tensor]:
        """Weights, Adam's moments and dead counters by name; the step count is ``done``."""
        named = {f"weights.{name}": tensor for name, tensor in self.weights.items()}
        for name, tensor in self.weights.items():
            moments = self._optimizer.state[tensor]
            named |= {f"{key}.{name}": moments.get(key, torch.zeros_like(tensor)) for key in MOMENTS}
        return {**named, "idle": self.idle}

    def restore(self, state: Mapping[str, Tensor], done: int) -> None:
        """Go on from a state.

        Values are copied into the tensors that are there: those of a file may lie at other alignments in
        memory, which can change how a product is summed.
        """
        self.done = done
        self.idle.copy_(state["idle"])
        for name, tensor in self.weights.items():
            tensor.copy_(state[f"weights.{name}"])
            moments: dict[str, Any] = {
                key: torch.empty_like(tensor).copy_(state[f"{key}.{name}"]) for key in MOMENTS
            }
            count = torch.tensor(float(done), device=tensor.device)
            self._optimizer.state[tensor] = {"step": count, **moments}

    def _update(self, gradients: dict[str, Tensor]) -> None:
        decoder = self.weights["W_dec"]
        along = (gradients["W_dec"] * decoder).sum(dim=1, keepdim=True)
        gradients["W_dec"].addcmul_(along, decoder, value=-1)
        for name, tensor in self.weights.items():
            tensor.grad = gradients[name]
        self._optimizer.param_groups[0]["lr"] = self.schedule.at(self.done)
        self._optimizer.step()
        decoder /= decoder.norm(dim=1, keepdim=True)

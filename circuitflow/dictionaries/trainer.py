"""The inside of the training loop: weights, optimizer, schedule and dead counters, one batch at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitflow.dictionaries.joint import Joint
from circuitflow.dictionaries.objective import Context, Gradients, Objective, Step
from circuitflow.dictionaries.resampling import Resampling, revive

BETAS = (0.9, 0.999)
MOMENTS = ("exp_avg", "exp_avg_sq")
MEMBERS = (
    1000  # more than any model has layers: seeds of a family's members do not meet those of another seed
)
FIRST_ENCODER_SCALE = 0.5  # encoder = half the decoder at first: .136 → .128 held-out FVU in a short run


class NonFiniteError(ArithmeticError):
    """The loss or the gradient of a batch was NaN or infinite; the weights are still those from before it."""


@dataclass(frozen=True)
class Schedule:
    """What changes with the step: learning rate and weight of sparsity penalties.

    The learning rate warms up linearly, stays, and falls linearly to zero over the last part.
    """

    peak: float
    steps: int
    warmup: float
    decay: float
    sparsity_warmup: float = 0.0

    def at(self, done: int) -> float:
        """Learning rate of the step that follows ``done`` steps."""
        rise = (done + 1) / max(1.0, self.warmup * self.steps)
        fall = (self.steps - done) / max(1.0, self.decay * self.steps)
        return self.peak * min(1.0, rise, fall)

    def sparsity(self, done: int) -> float:
        """Factor of sparsity penalties at that step: rises linearly from 0 to 1."""
        rising = self.sparsity_warmup * self.steps
        return min(1.0, done / rising) if rising > 0 else 1.0


def first_weights(
    objective: Objective,
    d_model: int,
    d_dict: int,
    seed: int,
    device: torch.device | str = "cpu",
    d_out: int | None = None,
    sites: int = 1,
) -> dict[str, Tensor]:
    """Random decoder rows of norm 1, the encoder along them, no biases, and what the objective adds or changes.

    Drawn on the CPU, so that a seed means the same weights everywhere.

    :param d_out: width of what is reconstructed, where that is not what is read: decoder rows are then random on their
        own.
    :param sites: how many sites what is read is made of. Rows have the same direction at each at first: a feature of
        two models then keeps one direction in both (median cosine .98 in place of .52 where little differs).
    """
    generator = torch.Generator().manual_seed(seed)
    encoder = decoder = _unit_rows(d_dict, d_model // sites, generator).repeat(1, sites) / sites**0.5
    if d_out is not None:
        decoder = _unit_rows(d_dict, d_out, generator)
    weights = {
        "W_enc": FIRST_ENCODER_SCALE * encoder,
        "b_enc": torch.zeros(d_dict),
        "W_dec": decoder,
        "b_dec": torch.zeros(decoder.shape[1]),
        **objective.extra_weights(d_dict),
        **objective.tracked(d_dict),
    }
    return {name: tensor.to(device) for name, tensor in weights.items()}


def first_joint_weights(joint: Joint, seed: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Those of every member, each drawn from a stream of its own, and their one b_dec."""
    d, d_dict = joint.d, joint.d_dict
    weights: dict[str, Tensor] = {"b_dec": torch.zeros(joint.outputs * d)}
    for m, first in enumerate(joint.first):
        generator = torch.Generator().manual_seed(seed * MEMBERS + m)
        weights[f"{m}.W_enc"] = FIRST_ENCODER_SCALE * _unit_rows(d_dict, d, generator)
        weights[f"{m}.b_enc"] = torch.zeros(d_dict)
        weights[f"{m}.W_dec"] = _unit_rows(d_dict, (joint.outputs - first) * d, generator)
    weights |= joint.extra_weights(d_dict) | joint.tracked(d_dict)
    return {name: tensor.to(device) for name, tensor in weights.items()}


def _unit_rows(n: int, width: int, generator: torch.Generator) -> Float[Tensor, "n width"]:
    draw = torch.randn(n, width, generator=generator)
    return draw / draw.norm(dim=1, keepdim=True)


class Trainer:
    """Takes training steps on normalised vectors (mean ‖x‖² = 1 at every site).

    If the objective asks for it, decoder rows keep norm 1: the part of their gradient along the row is taken out
    before the optimizer sees it, and rows are scaled back after its step. Random numbers depend on the step's number
    and on nothing that was drawn before, so :meth:`state` is all that a resumed run needs.
    """

    def __init__(
        self,
        objective: Objective,
        weights: dict[str, Tensor],
        schedule: Schedule,
        dead_after: int,
        *,
        clip_norm: float | None = None,
        precision: str = "float32",
        resampling: Resampling | None = None,
    ) -> None:
        """Start from ``weights`` (:func:`first_weights`), which the steps change in place.

        :param dead_after: tokens without firing after which a feature is dead.
        :param clip_norm: largest norm of the gradient of all weights together.
        :param precision: ``bfloat16`` lets torch's autocast take the objective's matrix products in it. Weights, their
            gradients, Adam and sums keep the type of the weights.
        """
        self.objective = objective
        self.weights = weights
        self.schedule = schedule
        self.done = 0
        self.gradient_norm = 0.0
        """Of the last step, before clipping."""
        self.resampled = 0
        """Features resampled so far."""
        self._decoders = [name for name in weights if name.rpartition(".")[2] == "W_dec"]
        decoder, d_dict = weights[self._decoders[0]], weights[self._decoders[0]].shape[0]
        self.idle = torch.zeros(d_dict * len(self._decoders), dtype=torch.int64, device=decoder.device)
        self._dead_after = dead_after
        self._clip_norm = clip_norm
        self._low_precision = precision == "bfloat16"
        self._resampling = resampling
        tracked = objective.tracked(d_dict)
        self._learned = {name: tensor for name, tensor in weights.items() if name not in tracked}
        learned = list(self._learned.values())
        self._optimizer = torch.optim.Adam(learned, lr=schedule.peak, betas=BETAS, fused=True)

    @property
    def dead(self) -> Bool[Tensor, " d_dict"]:
        """Features that have not been active for ``dead_after`` tokens."""
        return self.idle > self._dead_after

    @property
    def dead_share(self) -> float:
        """Share of dead features."""
        return float(self.dead.float().mean())

    @property
    def finite(self) -> bool:
        """Whether every weight is a finite number: a feature whose weights are not may never be selected again."""
        return all(bool(tensor.isfinite().all()) for tensor in self.weights.values())

    def step(self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"] | None = None) -> Step:
        """Take one step.

        :param y: what is to be reconstructed; ``x`` itself by default.
        :raises NonFiniteError: the loss or its gradient is NaN or infinite; nothing has been changed.
        """
        sparsity = self.schedule.sparsity(self.done)
        context = Context(self.dead, self.done / self.schedule.steps, sparsity)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._low_precision):
            step = self.objective.step(self.weights, x, context, *(() if y is None else (y,)))
        self._update(self._usable(step))
        for name, tensor in step.tracked.items():
            self.weights[name].copy_(tensor)
        self.idle += x.shape[0]
        self.idle[step.fired] = 0
        self.done += 1
        if self._resampling is not None and self._resampling.due(self.done, self.schedule.steps):
            self._resample(x, self._resampling)
        return step

    def state(self) -> dict[str, Tensor]:
        """Weights, what the kind tracks, Adam's moments and dead counters by name; the step count is ``done``."""
        named = {f"weights.{name}": tensor for name, tensor in self.weights.items()}
        for name, tensor in self._learned.items():
            moments = self._optimizer.state[tensor]
            named |= {f"{key}.{name}": moments.get(key, torch.zeros_like(tensor)) for key in MOMENTS}
        return {**named, "idle": self.idle, "resampled": torch.tensor(self.resampled)}

    def restore(self, state: Mapping[str, Tensor], done: int) -> None:
        """Go on from a state.

        Values are copied into the tensors that are there: those of a file may lie at other alignments in
        memory, which can change how a product is summed.
        """
        self.done = done
        self.resampled = int(state["resampled"])
        self.idle.copy_(state["idle"])
        for name, tensor in self.weights.items():
            tensor.copy_(state[f"weights.{name}"])
        for name, tensor in self._learned.items():
            moments: dict[str, Any] = {
                key: torch.empty_like(tensor).copy_(state[f"{key}.{name}"]) for key in MOMENTS
            }
            count = torch.tensor(float(done), device=tensor.device)
            self._optimizer.state[tensor] = {"step": count, **moments}

    def _usable(self, step: Step) -> Gradients:
        """Gradients of the learned weights as the optimizer takes them: projected, checked, clipped."""
        gradients = {name: step.gradients[name].to(w.dtype) for name, w in self._learned.items()}
        for name in self._decoders if self.objective.unit_decoder else ():
            decoder = self.weights[name]
            along = (gradients[name] * decoder).sum(dim=1, keepdim=True)
            gradients[name].addcmul_(along, decoder, value=-1)
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        loss, self.gradient_norm = torch.stack([step.reconstruction + step.auxiliary, norm]).tolist()
        if not math.isfinite(loss):
            raise NonFiniteError("loss")
        if not math.isfinite(self.gradient_norm):
            raise NonFiniteError("gradient")
        if self._clip_norm is not None and self.gradient_norm > self._clip_norm:
            for gradient in gradients.values():
                gradient.mul_(self._clip_norm / self.gradient_norm)
        return gradients

    def _update(self, gradients: Gradients) -> None:
        for name, tensor in self._learned.items():
            tensor.grad = gradients[name]
        self._optimizer.param_groups[0]["lr"] = self.schedule.at(self.done)
        self._optimizer.step()
        for name in self._decoders if self.objective.unit_decoder else ():
            decoder = self.weights[name]
            decoder /= decoder.norm(dim=1, keepdim=True)

    def _resample(self, x: Float[Tensor, "batch d_model"], resampling: Resampling) -> None:
        revived = revive(self.objective, self.weights, x, self.dead, resampling.generator(self.done))
        for name, tensor in self._learned.items():
            if name != "b_dec":
                for key in MOMENTS:
                    self._optimizer.state[tensor][key][revived] = 0
        self.idle[revived] = 0
        self.resampled += len(revived)

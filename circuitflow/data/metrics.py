"""Metrics: what is attributed. m is small when the model is right, so that IE > 0 means support of the clean answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.errors import UserError, nearest

Logits = Float[Tensor, "batch vocab"]
Answers = Int64[Tensor, "batch answers"]
Values = Float[Tensor, " batch"]

JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda values: values.amax(-1),
    "logsumexp": lambda values: values.logsumexp(-1),
}
"""How the logits of several answers on one side become one; a single answer is left as it is."""

KINDS = ("logit_difference", "logit", "log_probability", "kl")


@dataclass(frozen=True)
class Metric:
    """A number per prompt, in nats or logits, differentiable in the logits.

    - ``logit_difference``: logit(wrong) − logit(right).
    - ``logit``: −logit(right), which needs no wrong answer.
    - ``log_probability``: −log p(right), the probability of all right answers together (``max``: of the likeliest).
    - ``kl``: KL(reference ‖ model), 0 where the logits are those of the reference run.
    """

    kind: str
    wrong_answers: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"Key task.metric.kind is {self.kind}; {nearest(self.kind, KINDS)}.")
        if self.wrong_answers not in JOINS:
            raise UserError(
                f"Key task.metric.wrong_answers is {self.wrong_answers}; {nearest(self.wrong_answers, JOINS)}."
            )

    @property
    def normalises(self) -> bool:
        """Whether it needs the logits of the whole vocabulary, not of the answers alone."""
        return self.kind in ("log_probability", "kl")

    def __call__(
        self, logits: Logits, right: Answers, wrong: Answers, reference: Logits | None = None
    ) -> Values:
        """m of each prompt, from the logits at the position of its answer.

        :param right: token ids that are right, filled up with −1; ``wrong`` likewise.
        :param reference: logits of the clean run, for ``kl`` only.
        """
        if self.kind == "logit_difference":
            return self.joined(logits, wrong) - self.joined(logits, right)
        if self.kind == "logit":
            return -self.joined(logits, right)
        if self.kind == "log_probability":
            return -self.joined(logits.log_softmax(-1), right)
        if reference is None:
            raise ValueError("the metric kl needs the reference run's logits")
        expected = reference.log_softmax(-1)
        return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)

    def joined(self, logits: Logits, answers: Answers) -> Values:
        """The logits of a set of answers as one number per prompt; every set needs at least one answer."""
        chosen = logits.gather(-1, answers.clamp(min=0)).masked_fill(answers < 0, -torch.inf)
        return JOINS[self.wrong_answers](chosen)


def metric_of(params: Mapping[str, Any]) -> Metric:
    """The metric that the configuration describes: ``kind`` and ``wrong_answers``.

    :raises UserError: there is no such metric; names the nearest.
    """
    return Metric(params["kind"], params["wrong_answers"])

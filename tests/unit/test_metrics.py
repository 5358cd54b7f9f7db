"""Metrics: sign, several answers, gradients."""

import math

import pytest
import torch

from circuitflow.data.metrics import Metric, metric_of
from circuitflow.errors import UserError

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 1.0]], dtype=torch.float64)
RIGHT = torch.tensor([[0], [0]])
WRONG = torch.tensor([[1], [1]])


@pytest.mark.parametrize("join", ["max", "logsumexp"])
def test_logit_difference_is_wrong_minus_right(join: str) -> None:
    metric = Metric("logit_difference", join)
    assert metric(LOGITS, RIGHT, WRONG).tolist() == [-1.0, 3.0]  # negative where the model is right


def test_several_wrong_answers() -> None:
    wrong = torch.tensor([[1, 2], [3, -1]])
    assert Metric("logit_difference", "max")(LOGITS, RIGHT, wrong).tolist() == [-1.0, 1.0]
    joined = Metric("logit_difference", "logsumexp")(LOGITS, RIGHT, wrong)
    torch.testing.assert_close(joined, torch.tensor([math.log(math.e + 1) - 2, 1.0], dtype=torch.float64))


def test_log_probability_is_of_all_right_answers_together() -> None:
    right = torch.tensor([[0, 1], [2, -1]])
    expected = [-math.log((math.exp(2) + math.exp(1)) / sum(map(math.exp, (2, 1, 0, -1))))]
    expected.append(-math.log(math.exp(1) / sum(map(math.exp, (0, 3, 1, 1)))))
    found = Metric("log_probability", "logsumexp")(LOGITS, right, WRONG)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_kl_is_zero_on_the_reference_run_and_positive_elsewhere() -> None:
    metric = Metric("kl", "max")
    assert metric(LOGITS, RIGHT, WRONG, LOGITS).abs().max() < 1e-12
    p, q = LOGITS.softmax(-1), LOGITS.flip(0).softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(metric(LOGITS.flip(0), RIGHT, WRONG, LOGITS), expected)
    assert (expected > 0).all()
    with pytest.raises(ValueError, match="reference"):
        metric(LOGITS, RIGHT, WRONG)


@pytest.mark.parametrize("kind", ["logit_difference", "log_probability", "kl"])
@pytest.mark.parametrize("join", ["max", "logsumexp"])
def test_gradients_equal_finite_differences(kind: str, join: str) -> None:
    metric = Metric(kind, join)
    right, wrong = torch.tensor([[0, -1], [2, 3]]), torch.tensor([[1, 2], [1, -1]])
    reference = LOGITS.flip(1)
    logits = (LOGITS + 0.1 * torch.arange(4)).requires_grad_()  # no ties, where max has no derivative
    assert torch.autograd.gradcheck(lambda x: metric(x, right, wrong, reference), (logits,))


def test_logit_difference_has_gradient_on_its_answers_alone() -> None:
    logits = LOGITS.clone().requires_grad_()
    Metric("logit_difference", "logsumexp")(logits, RIGHT, torch.tensor([[2, -1], [3, -1]])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-1, 0, 1, 0], [-1, 0, 0, 1]]


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'logit_difference'"):
        metric_of({"kind": "logit_diff", "wrong_answers": "max"})
    with pytest.raises(UserError, match="did you mean 'logsumexp'"):
        metric_of({"kind": "kl", "wrong_answers": "logsumex"})
    assert metric_of({"kind": "kl", "wrong_answers": "max"}) == Metric("kl", "max")


@pytest.mark.parametrize("join", ["max", "logsumexp"])
def test_logit_needs_no_wrong_answer_and_is_minus_that_of_the_right_one(join: str) -> None:
    nothing = torch.empty((2, 0), dtype=torch.int64)
    logits = LOGITS.clone().requires_grad_()
    values = Metric("logit", join)(logits, RIGHT, nothing)
    assert values.tolist() == [-2.0, 0.0]
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert gradient.tolist() == [[-1.0, 0, 0, 0]] * 2

"""The metric from the answers' logits alone is that from the whole vocabulary's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from circuitflow.attribution.readout import answer_logits, metric_of_run
from circuitflow.data.metrics import KINDS, Metric
from circuitflow.models.running import run
from tests.fixtures.attribution_toy import toy_pairs


@pytest.mark.parametrize("join", ["max", "logsumexp"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2", "llama"])
def test_metric_of_a_run_is_that_of_all_logits(
    random_lm: Callable[..., Any], architecture: str, kind: str, join: str
) -> None:
    """Gradients too; with several answers on a side, some of them filled up."""
    lm, pairs, metric = random_lm(architecture), toy_pairs(4), Metric(kind, join)
    filled = torch.tensor([[7, 7], [9, -1], [11, 5], [8, -1]])
    pairs = type(pairs)(**{**vars(pairs), "right": filled, "wrong": pairs.wrong})
    this = run(lm, pairs.clean, pairs.mask, capture=["embed"], stop_at=f"resid.{lm.n_layers - 1}", grad=True)
    reference = torch.randn(4, lm.hf.config.vocab_size, dtype=torch.float64)
    found = metric_of_run(lm, metric, this, pairs, reference)
    whole = metric(answer_logits(lm, this, pairs.position), pairs.right, pairs.wrong, reference)
    assert found.std() > 0
    assert torch.allclose(found, whole, atol=1e-12)
    for value in (found, whole):
        assert value.requires_grad
    gradients = [
        torch.autograd.grad(value.sum(), this.sites["embed"], retain_graph=True)[0]
        for value in (found, whole)
    ]
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, atol=1e-12)

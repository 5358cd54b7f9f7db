"""Reading the metric, and the logits of the answers, off a run of the model."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.data.metrics import Metric
from circuitflow.data.token_pairs import TokenPairs
from circuitflow.models.running import LanguageModel, Run


def metric_of_run(
    lm: LanguageModel,
    metric: Metric,
    this: Run,
    pairs: TokenPairs,
    reference: Float[Tensor, "batch vocab"] | None = None,
) -> Float[Tensor, " batch"]:
    """m of every prompt of a pass that went on to the last block.

    The product with the whole unembedding costs as much as a block of a small model, and most metrics need only the
    logits of the answers; no others are computed for these.

    :param reference: logits of the clean run, for the metric kl.
    """
    assert this.last is not None
    with torch.set_grad_enabled(this.last.requires_grad):
        if metric.normalises:
            return metric(answer_logits(lm, this, pairs.position), pairs.right, pairs.wrong, reference)
        answers = torch.cat([pairs.right, pairs.wrong], dim=1)
        tokens, place = answers.clamp(min=0).unique(return_inverse=True)
        place = place.where(answers >= 0, -1)
        right = pairs.right.shape[1]
        logits = answer_logits(lm, this, pairs.position, tokens)
        return metric(logits, place[:, :right], place[:, right:])


def answer_logits(
    lm: LanguageModel,
    this: Run,
    position: Int64[Tensor, " batch"],
    tokens: Int64[Tensor, " tokens"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Logits where each prompt's answer is read, float32 or better; other positions are never unembedded.

    :param tokens: the only columns wanted; by default the whole vocabulary.
    """
    assert this.last is not None
    rows = this.last[torch.arange(len(position), device=position.device), position]
    with torch.set_grad_enabled(rows.requires_grad):
        logits = lm.unembed(rows, tokens)
        return logits if logits.dtype == torch.float64 else logits.float()

"""Reading the logits of the answers off a run of the model."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.models.running import LanguageModel, Run


def answer_logits(
    lm: LanguageModel, this: Run, position: Int64[Tensor, " batch"]
) -> Float[Tensor, "batch vocab"]:
    """Logits where each prompt's answer is read, float32 or better; other positions are never unembedded."""
    assert this.last is not None
    rows = this.last[torch.arange(len(position), device=position.device), position]
    with torch.set_grad_enabled(rows.requires_grad):
        logits = lm.unembed(rows)
        return logits if logits.dtype == torch.float64 else logits.float()

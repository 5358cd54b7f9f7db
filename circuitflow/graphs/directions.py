"""Logit nodes of a graph as combinations of tokens' logits."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.graphs.graph import NO_TOKEN, Graph
from circuitflow.models.frozen import FrozenPrompt

Parts = Mapping[int, float]
"""Coefficient of each token's logit; empty for a direction that was given as a row, not as tokens."""


def parts_of(graph: Graph) -> list[Parts]:
    """What each logit node is made of."""
    said = graph.facts.get("directions") or {}
    combinations = [
        {int(token): float(value) for token, value in said.get(str(rank), {}).items()}
        for rank in range(len(graph.logits))
    ]
    return [
        {token: 1.0} if token != NO_TOKEN else combination
        for token, combination in zip(graph.logits.tolist(), combinations, strict=True)
    ]


def facts_of(parts: Sequence[Parts]) -> dict[str, dict[str, float]]:
    """Combinations as facts of a graph keep them: token → coefficient by the logit's place; tokens are left out."""
    return {
        str(rank): {str(token): value for token, value in of.items()} for rank, of in enumerate(parts) if of
    }


def combined_row(frozen: FrozenPrompt, parts: Parts) -> Float[Tensor, " d_model"]:
    """Row of the unembedding that a combination of logits, each less the vocabulary's mean, reads with."""
    tokens = torch.tensor(list(parts), device=frozen.embed.device)
    return frozen.embed.new_tensor(list(parts.values())) @ frozen.logit_rows(tokens)

"""What a dictionary in training reconstructs, by the rule that it will have at inference."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes, decode_codes
from circuitflow.dictionaries.gradients import Weights, pre_activations
from circuitflow.dictionaries.objective import Objective
from circuitflow.dictionaries.selection import selection

CHUNK_ROWS = 512  # fixed, so that sums do not depend on a setting; bounds the pre-activations held at once


def reconstruct(
    objective: Objective, weights: Weights, x: Float[Tensor, "n d_model"]
) -> Iterator[tuple[Codes, Float[Tensor, "chunk d_model"]]]:
    """Codes and error x − x̂ of normalised vectors, a chunk of them at a time."""
    done = objective.finish(weights)
    select = selection(objective.select)
    for chunk in x.split(CHUNK_ROWS):
        codes = select(pre_activations(done.weights, chunk), done.settings, done.extra)
        yield codes, chunk - decode_codes(codes, done.weights["W_dec"]) - done.weights["b_dec"]


def quality(objective: Objective, weights: Weights, x: Float[Tensor, "n d_model"]) -> dict[str, float]:
    """FVU, L0 and share of silent features over normalised vectors, for the log."""
    missed, active = x.new_zeros((), dtype=torch.float64), 0
    silent = torch.ones_like(weights["b_enc"], dtype=torch.bool)
    for codes, error in reconstruct(objective, weights, x):
        missed += error.double().square().sum()
        active += codes.nnz
        silent[codes.features] = False
    variance = (x - x.mean(dim=0)).double().square().sum()
    return {
        "fvu": float(missed / variance),
        "l0": active / x.shape[0],
        "silent": float(silent.float().mean()),
    }

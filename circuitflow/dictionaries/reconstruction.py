"""What a dictionary in training reconstructs, by the rule that it will have at inference."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes, decode_codes
from circuitflow.dictionaries.gradients import Weights, pre_activations
from circuitflow.dictionaries.joint import Joint
from circuitflow.dictionaries.objective import Finished, Objective
from circuitflow.dictionaries.selection import selection

CHUNK_ROWS = 512  # fixed, so that sums do not depend on a setting; bounds the pre-activations held at once


def finished_members(objective: Objective, weights: Weights) -> list[Finished]:
    """The weights as inference uses them, one entry a dictionary."""
    if isinstance(objective, Joint):
        return objective.finish_members(weights)
    return [objective.finish(weights)]


def reconstruct(
    objective: Objective,
    weights: Weights,
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "n d_out"] | None = None,
) -> Iterator[tuple[list[Codes], Float[Tensor, "chunk d_out"]]]:
    """Codes of every dictionary, and error y − ŷ, of normalised vectors, a chunk of them at a time.

    :param y: what is reconstructed; ``x`` itself by default.
    """
    members = finished_members(objective, weights)
    select = selection(objective.select)
    y = x if y is None else y
    for chunk, target in zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS), strict=True):
        left, codes = target.clone(), []
        read = chunk.split(members[0].weights["W_enc"].shape[1], dim=1)
        for done, part in zip(members, read, strict=True):
            codes.append(select(pre_activations(done.weights, part), done.settings, done.extra))
            at = left.shape[1] - done.weights["W_dec"].shape[1]  # what several write ends at the last output
            left[:, at:] -= decode_codes(codes[-1], done.weights["W_dec"])
            left[:, at:] -= done.weights["b_dec"]
            if "W_skip" in done.weights:
                left[:, at:] -= part @ done.weights["W_skip"].T
        yield codes, left


def quality(
    objective: Objective,
    weights: Weights,
    x: Float[Tensor, "n d_in"],
    y: Float[Tensor, "n d_out"] | None = None,
    outputs: Sequence[str] = (),
) -> dict[str, Any]:
    """FVU, L0 of all dictionaries together, and share of silent features over normalised vectors, for the log.

    :param outputs: names of the sites that are written, if there are several: FVU of each is told too.
    """
    target = x if y is None else y
    missed, active = x.new_zeros(target.shape[1], dtype=torch.float64), 0
    silent: list[Tensor] = []
    total = x.new_zeros((), dtype=torch.float64)
    for codes, error in reconstruct(objective, weights, x, y):
        squares = error.double().square()
        total += squares.sum()
        missed += squares.sum(dim=0)
        silent = silent or [torch.ones(one.d_dict, dtype=torch.bool, device=x.device) for one in codes]
        for one, unseen in zip(codes, silent, strict=True):
            active += one.nnz
            unseen[one.features] = False
    squares = (target - target.mean(dim=0)).double().square()
    found: dict[str, Any] = {
        "fvu": float(total / squares.sum()),
        "l0": active / x.shape[0],
        "silent": float(torch.cat(silent).float().mean()),
    }
    if len(outputs) > 1:
        parts = zip(outputs, missed.chunk(len(outputs)), squares.sum(dim=0).chunk(len(outputs)), strict=True)
        found["fvu_of"] = {site: float(part.sum() / variance.sum()) for site, part, variance in parts}
    return found

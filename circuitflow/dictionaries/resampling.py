"""Dead features start again as directions of inputs that the dictionary reconstructs badly (Bricken et al. 2023,
"Towards Monosemanticity", appendix on resampling).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.dictionaries.objective import Objective
from circuitflow.dictionaries.reconstruction import reconstruct

ENCODER_SHARE = 0.2  # new encoder rows are short, so that they disturb little
STREAM = 0x5EED  # sets this stream apart from others with the same seed


@dataclass(frozen=True)
class Resampling:
    """When dead features are resampled, and with what random numbers."""

    every: int
    """Steps between resamplings."""
    until: float
    """Share of the steps after which nothing is resampled."""
    seed: int

    def due(self, done: int, steps: int) -> bool:
        """Whether features are resampled after step number ``done`` of ``steps``."""
        return done % self.every == 0 and done <= self.until * steps

    def generator(self, done: int) -> np.random.Generator:
        """The random numbers of that step, the same whether or not the run was resumed before it."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(STREAM, done)))


def revive(
    objective: Objective,
    weights: dict[str, Tensor],
    x: Float[Tensor, "batch d_model"],
    dead: Bool[Tensor, " d_dict"],
    generator: np.random.Generator,
) -> Int64[Tensor, " revived"]:
    """Give dead features new weights, in place, and tell which were revived.

    Each takes an input of the batch of its own, drawn with probability ∝ ‖x − x̂‖². The direction of x − b_dec becomes
    its decoder row, of norm 1, and its encoder row, of :data:`ENCODER_SHARE` of the mean norm of living encoder rows
    (of all rows if none lives). Its bias and what else the kind learns of it return to their first values. If the
    batch has fewer inputs with an error than there are dead features, the last of these wait for the next time; if
    none is dead nothing is changed.
    """
    features = dead.nonzero()[:, 0]
    if features.numel() == 0:
        return features
    errors = [error for _, error in reconstruct(objective, weights, x)]
    directions = _directions(torch.cat(errors), x - weights["b_dec"], len(features), generator)
    features = features[: len(directions)]
    living = weights["W_enc"] if bool(dead.all()) else weights["W_enc"][~dead]
    weights["W_dec"][features] = directions
    weights["W_enc"][features] = ENCODER_SHARE * living.norm(dim=1).mean() * directions
    first = objective.extra_weights(len(dead))
    first = {"b_enc": torch.zeros(len(dead)), **first}
    for name, tensor in first.items():
        weights[name][features] = tensor.to(weights[name])[features]
    return features


def _directions(
    errors: Float[Tensor, "batch d_model"],
    centred: Float[Tensor, "batch d_model"],
    wanted: int,
    generator: np.random.Generator,
) -> Float[Tensor, "drawn d_model"]:
    """Unit directions of at most ``wanted`` different inputs, drawn ∝ squared error."""
    norms = centred.norm(dim=1, keepdim=True)
    squares = errors.double().square().sum(dim=1)
    loss = torch.where((norms[:, 0] > 0) & squares.isfinite(), squares, 0).cpu().numpy()
    drawn = min(wanted, int(np.count_nonzero(loss)))
    if drawn == 0:
        return centred[:0]
    chosen = torch.from_numpy(generator.choice(len(loss), drawn, replace=False, p=loss / loss.sum()))
    chosen = chosen.to(centred.device)
    return centred[chosen] / norms[chosen]

"""Sums of edge weights over pairs: means, standard errors and bootstrap draws, kept so that a killed job goes on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.store.files import atomic_path


@dataclass
class Sums:
    """Running sums over pairs of what edges from one site weigh, in float64.

    Bootstrap draws weigh every pair by a Poisson number of mean 1, which resamples pairs without keeping them.
    """

    weight: Float[Tensor, "up down"]
    square: Float[Tensor, "up down"]
    draws: Float[Tensor, "draws up down"]
    effect: Float[Tensor, " up"]
    """What each upstream node is worth to the metric (AtP), on all its ways."""

    def add(
        self,
        effects: Float[Tensor, "batch up down"],
        own: Float[Tensor, "batch up"],
        times: Float[Tensor, "batch draws"],
    ) -> None:
        """Take in a batch; ``times`` says how often each draw holds each pair."""
        effects = effects.cpu()
        self.weight += effects.sum(0)
        self.square += effects.square().sum(0)
        self.draws += torch.einsum("bud,br->rud", effects, times)
        self.effect += own.cpu().sum(0)


def no_sums(up: int, down: int, draws: int) -> Sums:
    """Sums over no pair."""
    weight = torch.zeros(up, down, dtype=torch.float64)
    return Sums(weight, weight.clone(), weight.new_zeros(draws, up, down), weight.new_zeros(up))


def poisson(pairs: int, draws: int, seed: int) -> Float[Tensor, "pairs draws"]:
    """How often each bootstrap draw holds each pair."""
    return torch.from_numpy(
        np.random.default_rng([seed, draws]).poisson(1.0, (pairs, draws)).astype(np.float64)
    )


def keep(partial: Path, sums: dict[str, Sums], pairs: int) -> None:
    """Write sums over the first ``pairs`` pairs."""
    arrays = {
        f"{site}/{name}": value.numpy() for site, one in sums.items() for name, value in vars(one).items()
    }
    with atomic_path(partial) as temporary, open(temporary, "wb") as file:
        np.savez(file, pairs=pairs, **arrays)


def kept(partial: Path, sites: list[str]) -> tuple[dict[str, Sums], int] | None:
    """What :func:`keep` wrote, and over how many pairs; None if there is nothing."""
    if not partial.is_file():
        return None
    with np.load(partial, allow_pickle=False) as arrays:
        sums = {
            site: Sums(
                **{name: torch.from_numpy(arrays[f"{site}/{name}"]) for name in Sums.__dataclass_fields__}
            )
            for site in sites
        }
        return sums, int(arrays["pairs"])

"""What a crosscoder's decoders tell: how strongly each feature is written at each site, and which sites share it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.family import Family, load_family
from circuitflow.errors import UserError

Class = Literal["base", "shared", "tuned"]
CLASSES: tuple[Class, ...] = ("base", "shared", "tuned")
"""Of a crosscoder of two models: the first's alone, both's, the second's alone."""


@dataclass(frozen=True)
class Crosscoder:
    """One dictionary that reads and writes the same sites, with the decoder rows of each."""

    dictionary: Dictionary
    sites: tuple[str, ...]

    def decoder(self, site: str) -> Float[Tensor, "d_dict d"]:
        """Decoder rows at one of its sites, raw units per unit of activation."""
        return Family((self.dictionary,)).decoder(0, site)

    def part(self, joined: Float[Tensor, "n d_all"], site: str) -> Float[Tensor, "n d"]:
        """What of vectors of all sites side by side belongs to one."""
        at, width = self.sites.index(site), joined.shape[1] // len(self.sites)
        return joined[:, at * width : (at + 1) * width]


def load_crosscoder(path: Path) -> Crosscoder:
    """Read a crosscoder.

    :raises UserError: it is none: several members, one site, or other sites written than read.
    """
    family = load_family([path])
    only = family.members[0]
    if len(family.members) > 1 or len(only.reads) < 2 or only.reads != only.writes:
        raise UserError(
            f"Dictionary {path} is no crosscoder: it reads {', '.join(family.reads)} and writes "
            f"{', '.join(family.writes)}; name one that reads and writes the same two sites or more."
        )
    return Crosscoder(only, only.reads)


def decoder_norms(crosscoder: Crosscoder, scales: Mapping[str, float]) -> Float[Tensor, "d_dict sites"]:
    """Norm of every decoder row at every site, float64, in units of the site's own spread.

    :param scales: by site, the root mean square distance of its vectors from their mean. Norms are divided by it:
        sites whose vectors are longer would otherwise seem to carry more of each feature.
    """
    norms = [crosscoder.decoder(site).double().norm(dim=1) / scales[site] for site in crosscoder.sites]
    return torch.stack(norms, dim=1)


def relative_norm(
    first: Float[np.ndarray, " d_dict"], second: Float[np.ndarray, " d_dict"]
) -> Float[np.ndarray, " d_dict"]:
    """ρ = ‖d_B‖ / (‖d_A‖ + ‖d_B‖): 0 for a feature of the first model alone, 1 for the second's; NaN where both are 0.

    Lindsey et al. (2024), "Sparse Crosscoders for Cross-Layer Features and Model Diffing".
    """
    total = first + second
    return np.divide(second, total, out=np.full_like(total, np.nan), where=total > 0)


def classes_of(rho: Float[np.ndarray, " n"], shared: Sequence[float]) -> np.ndarray:
    """Class of each feature by its ρ: below the bounds ``base``, between them (both included) ``shared``, above
    ``tuned``; empty where ρ is not known.
    """
    low, high = shared
    found = np.where(rho < low, "base", np.where(rho > high, "tuned", "shared"))
    return np.where(np.isfinite(rho), found, "").astype(object)


def spread_of(norms: Float[np.ndarray, "n sites"]) -> dict[str, np.ndarray]:
    """Where features live: ``peak`` (the site's number), ``centre`` (mean of the sites' numbers by squared norm) and
    ``effective`` sites, (Σ n²)² / Σ n⁴: 1 for a feature of one site, as many as there are for one alike at all.

    NaN and −1 for a feature that no site has.
    """
    squares = norms**2
    total = squares.sum(axis=1)
    there = total > 0
    safe = np.where(there, total, 1)
    centre = (squares * np.arange(norms.shape[1])).sum(axis=1) / safe
    effective = total**2 / np.where(there, (squares**2).sum(axis=1), 1)
    return {
        "peak": np.where(there, norms.argmax(axis=1), -1),
        "centre": np.where(there, centre, np.nan),
        "effective": np.where(there, effective, np.nan),
    }

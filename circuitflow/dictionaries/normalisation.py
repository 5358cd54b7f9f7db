"""Inputs are trained on with their mean taken off and mean ‖x‖² = 1; saved weights take and give raw activations.

Where several sites are read or written, each is normalised by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.rows import SiteRows
from circuitflow.errors import UserError


@dataclass(frozen=True)
class Normalisation:
    """x → (x − mean) / scale."""

    mean: Float[Tensor, " d_model"]
    scale: float

    def apply(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Raw to normalised vectors."""
        return (x - self.mean) / self.scale

    def to(self, device: torch.device | str) -> "Normalisation":
        """On another device."""
        return Normalisation(self.mean.to(device), self.scale)

    def fold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that take and give raw vectors, from weights for normalised ones.

        Feature values are multiplied by ``scale``, so that decoder rows keep their norm: with y = (x −
        mean)/scale, scale·(W_enc·y + b_enc) = W_enc·x + (scale·b_enc − W_enc·mean). Computed in float64,
        given in the weights' type.
        """
        return fold([self], [self], weights)


def unit_of(written: Sequence[Normalisation]) -> float:
    """What feature values of a dictionary are multiplied by when it is folded: root mean square of the scales.

    For one site that is its scale. Any would do, but for the same unit for all features: TopK compares their values.
    """
    scales = [each.scale for each in written]
    return scales[0] if len(scales) == 1 else (sum(scale**2 for scale in scales) / len(scales)) ** 0.5


def fold(
    read: Sequence[Normalisation],
    written: Sequence[Normalisation],
    weights: Mapping[str, Tensor],
    offsets: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """Weights that read and write raw vectors of several sites side by side, from those for normalised ones.

    Values are multiplied by u = :func:`unit_of`. With s and m of each site, rows of W_enc become u/s_read of
    themselves, b_enc becomes u·b_enc − Σ W_enc·m, W_dec s_written/u of itself, b_dec s_written·b_dec + m, and
    W_skip (s_written/s_read)·W_skip, what it makes of the mean being taken off b_dec. Computed in float64, given in the
    weights' type.

    :param offsets: for each site written, whether this dictionary is the one that adds its mean; by default it is.
    """
    unit = unit_of(written)
    wide = {name: tensor.double().cpu() for name, tensor in weights.items()}
    mean, owned = _side_by_side(read)[0], _side_by_side(written)[0]
    if offsets is not None:
        owned = owned * _spread([float(own) for own in offsets], written)
    s_read, s_written = _side_by_side(read)[1], _side_by_side(written)[1]
    W_enc = wide["W_enc"] * (unit / s_read)
    folded = {
        "W_enc": W_enc,
        "b_enc": unit * wide["b_enc"] - W_enc @ mean,
        "W_dec": wide["W_dec"] * (s_written / unit),
        "b_dec": s_written * wide["b_dec"] + owned,
    }
    if "W_skip" in wide:
        folded["W_skip"] = wide["W_skip"] * s_written[:, None] / s_read
        folded["b_dec"] -= folded["W_skip"] @ mean
    return {name: tensor.to(weights[name].dtype) for name, tensor in folded.items()}


def together(each: Sequence[Normalisation]) -> "Normalisation | Several":
    """One that applies to the vectors of all sites side by side."""
    return each[0] if len(each) == 1 else Several(*(t.float() for t in _side_by_side(each)))


@dataclass(frozen=True)
class Several:
    """x → (x − mean) / scale, with a scale of each site's own."""

    mean: Float[Tensor, " d_all"]
    scale: Float[Tensor, " d_all"]

    def apply(self, x: Float[Tensor, "n d_all"]) -> Float[Tensor, "n d_all"]:
        """Raw to normalised vectors."""
        return (x - self.mean) / self.scale

    def to(self, device: torch.device | str) -> "Several":
        """On another device."""
        return Several(self.mean.to(device), self.scale.to(device))


def _side_by_side(each: Sequence[Normalisation]) -> tuple[Tensor, Tensor]:
    mean = torch.cat([one.mean.double().cpu() for one in each])
    return mean, _spread([one.scale for one in each], each)


def _spread(values: Sequence[float], each: Sequence[Normalisation]) -> Tensor:
    """One number a site, for every coordinate."""
    return torch.cat(
        [
            torch.full((len(one.mean),), value, dtype=torch.float64)
            for value, one in zip(values, each, strict=True)
        ]
    )


@dataclass
class Moments:
    """Sums over vectors in float64, from which their normalisation follows."""

    n: int = 0
    total: Float[Tensor, " d"] | float = 0.0
    squares: float = 0.0

    def add(self, x: Float[Tensor, "n d"]) -> None:
        """Add vectors."""
        wide = x.double()
        self.n += len(wide)
        self.total = self.total + wide.sum(dim=0)
        self.squares += float(wide.square().sum())

    def normalisation(self) -> Normalisation:
        """Mean and root mean squared distance from it.

        :raises UserError: no vector was added.
        """
        if not self.n:
            raise UserError("Every token is an outlier for this dictionary; raise its outlier_ratio.")
        mean = torch.as_tensor(self.total) / self.n
        variance = self.squares / self.n - float(mean.square().sum())
        return Normalisation(mean.float(), max(variance, 1e-30) ** 0.5)


def measure_normalisation(rows: SiteRows, keep: np.ndarray) -> Normalisation:
    """Of the kept rows."""
    moments = Moments()
    for _, x in rows.read(keep):
        moments.add(x)
    return moments.normalisation()

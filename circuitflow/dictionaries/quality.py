"""How well a dictionary explains vectors it has not seen: streaming sums, the same whatever the batch size."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.dictionary import Dictionary

DENSITY_EDGES = np.arange(-6, 0.01, 0.25)
"""Edges of the histogram of log10(share of tokens in which a feature is active)."""


@dataclass
class Sums:
    """Sums over vectors, in float64."""

    n: int = 0
    error: float = 0.0
    cosine: float = 0.0
    norm_ratio: float = 0.0
    active: int = 0
    distance: float = 0.0
    offset: Float[Tensor, " d_model"] | float = 0.0

    def add(
        self,
        x: Float[Tensor, "n d_model"],
        decoded: Float[Tensor, "n d_model"],
        active: Int64[Tensor, " n"],
        center: Float[Tensor, " d_model"],
    ) -> None:
        """Add vectors, their reconstructions and numbers of active features.

        :param center: any point near the mean, the same in every call; it saves the variance from cancellation.
        """
        x, decoded = x.double(), decoded.double()
        norms = x.norm(dim=1), decoded.norm(dim=1)
        tiny = torch.finfo(torch.float64).tiny
        self.n += x.shape[0]
        self.error += float((x - decoded).square().sum())
        self.cosine += float(((x * decoded).sum(dim=1) / (norms[0] * norms[1]).clamp_min(tiny)).sum())
        self.norm_ratio += float((norms[1] / norms[0].clamp_min(tiny)).sum())
        self.active += int(active.sum())
        self.distance += float((x - center.double()).square().sum())
        self.offset = self.offset + (x - center.double()).sum(dim=0)

    @property
    def variance(self) -> float:
        """Σ‖x − x̄‖² with the mean over all vectors added."""
        moved = torch.as_tensor(self.offset).square().sum() / self.n
        return self.distance - float(moved)

    def values(self) -> dict[str, float]:
        """FVU, L0, mean cosine of x and x̂, mean ‖x̂‖/‖x‖; nothing if no vector was added."""
        if not self.n:
            return {}
        return {
            "fvu": self.error / self.variance if self.variance > 0 else float("nan"),
            "l0": self.active / self.n,
            "cosine": self.cosine / self.n,
            "norm_ratio": self.norm_ratio / self.n,
        }


@dataclass
class Quality:
    """Quality of one dictionary, over the vectors it was made for ("kept") and over all, outliers included.

    An outlier has no active feature, so its reconstruction is b_dec.
    """

    dictionary: Dictionary
    kept: Sums = field(default_factory=Sums)
    all: Sums = field(default_factory=Sums)
    fired: Int64[Tensor, " d_dict"] = field(init=False)
    """Kept vectors in which each feature was active."""

    def __post_init__(self) -> None:
        self.fired = torch.zeros(self.dictionary.d_dict, dtype=torch.int64)

    def add(self, x: Float[Tensor, "n d_model"], positions: Int64[Tensor, " n"]) -> None:
        """Encode and decode vectors and add what comes of it."""
        codes = self.dictionary.encode(x, positions)
        decoded = self.dictionary.decode(codes)
        skipped = self.dictionary.skip.mask(x, positions)
        self._add(self.all, x, decoded, codes, torch.ones_like(skipped))
        self._add(self.kept, x, decoded, codes, ~skipped)
        self.fired += torch.bincount(codes.features, minlength=codes.d_dict).cpu()

    @property
    def skipped_share(self) -> float:
        """Share of vectors that the outlier rule skips."""
        return 1 - self.kept.n / self.all.n

    @property
    def silent_share(self) -> float:
        """Share of features that were active in no vector."""
        return float((self.fired == 0).double().mean())

    def density_histogram(self) -> np.ndarray:
        """Features per interval of :data:`DENSITY_EDGES`, without those never active or rarer than the first edge."""
        rates = self.fired.double().numpy() / max(1, self.kept.n)
        return np.histogram(np.log10(rates[rates > 0]), DENSITY_EDGES)[0]

    def _add(
        self,
        sums: Sums,
        x: Float[Tensor, "n d_model"],
        decoded: Float[Tensor, "n d_model"],
        codes: Codes,
        chosen: Bool[Tensor, " n"],
    ) -> None:
        if bool(chosen.any()):
            sums.add(x[chosen], decoded[chosen], codes.counts()[chosen], self.dictionary.b_dec)

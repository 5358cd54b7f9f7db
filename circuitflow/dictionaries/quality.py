"""How well a dictionary explains vectors it has not seen: streaming sums, the same whatever the batch size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.geometry import own_cosines, paired_cosines
from circuitflow.errors import UserError

DENSITY_EDGES = np.arange(-6, 0.01, 0.25)
"""Edges of the histogram of log10(share of tokens in which a feature is active)."""

HIGH_FREQUENCY = 0.1
"""A feature that is active in a larger share of tokens than this counts as one of high frequency."""

INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap that bound every interval."""

QUANTILES = (5, 25, 50, 75, 95, 99)
"""Percentiles that tell how cosines are spread over features."""

Draws = Float64[np.ndarray, "draws blocks"]
"""How often each block counts, in each of several draws."""


def check_one_site(dictionary: Dictionary) -> None:
    """Refuse dictionaries whose output is not a reconstruction of their input.

    :raises UserError: the dictionary reads or writes several sites, or writes another than it reads.
    """
    if len(dictionary.reads) != 1 or dictionary.writes != dictionary.reads:
        raise UserError(
            f"Dictionary of kind {dictionary.kind!r} reads {', '.join(dictionary.reads)} and writes "
            f"{', '.join(dictionary.writes)}; quality and studies are for dictionaries that reconstruct the one site "
            "they read: choose such a dictionary for this site."
        )


@dataclass
class Sums:
    """Sums over the vectors of each block of text, in float64."""

    blocks: int
    sums: dict[str, Float64[Tensor, " blocks"]] = field(init=False)
    offset: Float64[Tensor, "blocks d_model"] | None = field(init=False, default=None)
    """Σ(x − center)."""

    def __post_init__(self) -> None:
        names = ("n", "error", "cosine", "norm_ratio", "active", "distance")
        self.sums = {name: torch.zeros(self.blocks, dtype=torch.float64) for name in names}

    @property
    def n(self) -> int:
        """Vectors added."""
        return int(self.sums["n"].sum())

    @property
    def variance(self) -> float:
        """Σ‖x − x̄‖² with the mean over all vectors added."""
        return float(self._variance(np.ones((1, self.blocks)))[0])

    def add(
        self,
        x: Float[Tensor, "n d_model"],
        decoded: Float[Tensor, "n d_model"],
        active: Int64[Tensor, " n"],
        center: Float[Tensor, " d_model"],
        blocks: Int64[Tensor, " n"],
    ) -> None:
        """Add vectors, their reconstructions and numbers of active features.

        :param center: any point near the mean, the same in every call; it saves the variance from cancellation.
        :param blocks: the block that each vector belongs to.
        """
        x, decoded, center = x.double(), decoded.double(), center.double()
        norms = x.norm(dim=1), decoded.norm(dim=1)
        tiny = torch.finfo(torch.float64).tiny
        added = {
            "n": torch.ones_like(norms[0]),
            "error": (x - decoded).square().sum(dim=1),
            "cosine": (x * decoded).sum(dim=1) / (norms[0] * norms[1]).clamp_min(tiny),
            "norm_ratio": norms[1] / norms[0].clamp_min(tiny),
            "active": active.double(),
            "distance": (x - center).square().sum(dim=1),
        }
        for name, values in added.items():
            self.sums[name].index_add_(0, blocks.cpu(), values.cpu())
        if self.offset is None:
            self.offset = x.new_zeros(self.blocks, x.shape[1])
        self.offset.index_add_(0, blocks.to(x.device), x - center)

    def values(self) -> dict[str, float]:
        """FVU, L0, mean cosine of x and x̂, mean ‖x̂‖/‖x‖; nothing if no vector was added."""
        drawn = self.drawn(np.ones((1, self.blocks)))
        return {name: float(values[0]) for name, values in drawn.items()} if self.n else {}

    def drawn(self, draws: Draws) -> dict[str, Float64[np.ndarray, " draws"]]:
        """:meth:`values` for each of several draws of blocks; NaN for a draw without a vector."""
        totals = {name: _totals(draws, values) for name, values in self.sums.items()}
        n = totals["n"]
        means = {
            name: ratio(totals[key], n)
            for name, key in {"l0": "active", "cosine": "cosine", "norm_ratio": "norm_ratio"}.items()
        }
        return {"fvu": ratio(totals["error"], self._variance(draws)), **means}

    def _variance(self, draws: Draws) -> Float64[np.ndarray, " draws"]:
        if self.offset is None:
            return np.zeros(len(draws))
        n, distance = (_totals(draws, self.sums[name]) for name in ("n", "distance"))
        moved = np.square(_totals(draws, self.offset)).sum(axis=1)
        return np.maximum(distance - np.nan_to_num(ratio(moved, n)), 0)


@dataclass
class Quality:
    """Quality of one dictionary, over the vectors it was made for ("kept") and over all, outliers included.

    An outlier has no active feature, so its reconstruction is b_dec.
    """

    dictionary: Dictionary
    blocks: int
    """Blocks of text that vectors come from."""
    kept: Sums = field(init=False)
    all: Sums = field(init=False)
    fired: Int64[Tensor, " d_dict"] = field(init=False)
    """Kept vectors in which each feature was active."""

    def __post_init__(self) -> None:
        self.kept, self.all = Sums(self.blocks), Sums(self.blocks)
        self.fired = torch.zeros(self.dictionary.d_dict, dtype=torch.int64)

    def add(
        self, x: Float[Tensor, "n d_model"], positions: Int64[Tensor, " n"], blocks: Int64[Tensor, " n"]
    ) -> None:
        """Encode and decode vectors and add what comes of it."""
        codes = self.dictionary.encode(x, positions)
        decoded = self.dictionary.decode(codes, x)
        skipped = self.dictionary.skip.mask(x, positions)
        blocks = blocks.to(x.device)
        self._add(self.all, x, decoded, codes, torch.ones_like(skipped), blocks)
        self._add(self.kept, x, decoded, codes, ~skipped, blocks)
        self.fired += torch.bincount(codes.features, minlength=codes.d_dict).cpu()

    @property
    def skipped_share(self) -> float:
        """Share of vectors that the outlier rule skips."""
        return 1 - self.kept.n / self.all.n

    @property
    def densities(self) -> Float64[np.ndarray, " d_dict"]:
        """Share of kept vectors in which each feature was active."""
        return self.fired.double().numpy() / max(1, self.kept.n)

    @property
    def silent_share(self) -> float:
        """Share of features that were active in no vector."""
        return float((self.fired == 0).sum()) / max(1, len(self.fired))

    @property
    def high_frequency_share(self) -> float:
        """Share of features that were active in more than a tenth of the vectors."""
        return float((self.densities > HIGH_FREQUENCY).sum()) / max(1, len(self.densities))

    def density_histogram(self) -> np.ndarray:
        """Features per interval of :data:`DENSITY_EDGES`, without those never active or rarer than the first edge."""
        rates = self.densities
        return np.histogram(np.log10(rates[rates > 0]), DENSITY_EDGES)[0]

    def _add(
        self,
        sums: Sums,
        x: Float[Tensor, "n d_model"],
        decoded: Float[Tensor, "n d_model"],
        codes: Codes,
        chosen: Bool[Tensor, " n"],
        blocks: Int64[Tensor, " n"],
    ) -> None:
        if bool(chosen.any()):
            sums.add(
                x[chosen], decoded[chosen], codes.counts()[chosen], self.dictionary.b_dec, blocks[chosen]
            )


def weight_statistics(dictionary: Dictionary) -> dict[str, float]:
    """How the directions of features lie to each other: cosines of decoder rows, and of encoder with decoder rows.

    decoder_cosine_mean is the mean |cosine| over all pairs, nearest_cosine the largest cosine of a row with another
    one; rows of norm 0 are left out, and NaN says that none is left.
    """
    nearest, mean = own_cosines(dictionary.W_dec)
    found = {"decoder_cosine_mean": mean, **_spread("nearest_cosine", nearest.cosine)}
    if dictionary.W_enc is not None:
        found |= _spread("enc_dec_cosine", paired_cosines(dictionary.W_enc, dictionary.W_dec))
    return found


def intervals(
    blocks: int, draws: int, seed: int, drawn: Callable[[Draws], Mapping[str, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of quantities: blocks of text are drawn with replacement, as many as there are.

    Tokens of one block are alike, so that resampling single tokens would give intervals that are too narrow. One
    block alone says nothing of the spread: its intervals are NaN.
    """
    if blocks < 2:
        return {name: (float("nan"), float("nan")) for name in drawn(np.ones((1, blocks)))}
    counts = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=draws)
    found = {}
    for name, values in drawn(counts.astype(np.float64)).items():
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, INTERVAL) if finite.size else (np.nan, np.nan)
        found[name] = (float(low), float(high))
    return found


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotients; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def _totals(draws: Draws, values: Float64[Tensor, "blocks ..."]) -> Float64[np.ndarray, "draws ..."]:
    """Sums over the blocks of each draw, by torch, whose number of threads is part of a stage's parameters."""
    return (torch.from_numpy(draws) @ values.cpu()).numpy()


def _spread(name: str, values: Float[Tensor, " n"]) -> dict[str, float]:
    known = values[~values.isnan()].double().cpu().numpy()
    if not known.size:
        known = np.array([np.nan])
    quantiles = {f"{name}_p{q:02}": float(np.percentile(known, q)) for q in QUANTILES}
    return {f"{name}_mean": float(known.mean()), **quantiles, f"{name}_max": float(known.max())}

"""What each feature of a dictionary does on kept tokens: how often, how strongly, what it is worth, how firm it is.

**Importance** of feature i: the increase of the squared error when it alone is removed, as share of the variance,

    importance_i = Σ_t (‖e_t + f_i(t)·d_i‖² − ‖e_t‖²) / Σ_t ‖x_t − x̄‖²
                 = Σ_t (2·f_i(t)·d_i·e_t + f_i(t)²·‖d_i‖²) / Σ_t ‖x_t − x̄‖²

with e = x − x̂ and d_i the decoder row. 0.01 means: without this feature FVU is larger by 0.01, all others left as they
are. It is negative for a feature that does harm. Features that share their work are worth little each, so importances
need not sum to 1 − FVU.

**Sensitivity** of feature i: how much of its activity a small random displacement of the vectors changes,

    sensitivity_i = Σ_t |f_i(x_t + ε_t) − f_i(x_t)| / Σ_t |f_i(x_t)|
    ε_t = 0.1·‖x_t − x̄‖·g_t / √d_model,  g_t ~ N(0, 1)

so that ‖ε_t‖ is near a tenth of ‖x_t − x̄‖. 0 means that it does not move; 1, that as much activity is gained and lost
as there was. It counts both the change of values and firing that starts or stops; NaN for a feature that is never
active.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes, decode_codes
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.geometry import own_cosines, paired_cosines
from circuitflow.dictionaries.quality import HIGH_FREQUENCY, Sums, ratio
from circuitflow.features.held_out import QUARTERS, HeldOut, encode_kept

NOISE = 0.1
"""Norm of the displacement that sensitivity is measured with, as share of ‖x − x̄‖."""


@dataclass
class Usage:
    """How often each feature is active, quarter by quarter, and how well the dictionary reconstructs."""

    d_dict: int
    tokens: Int64[np.ndarray, " quarters"] = field(init=False)
    fired: Int64[np.ndarray, "quarters d_dict"] = field(init=False)
    sums: Sums = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = np.zeros(QUARTERS, np.int64)
        self.fired = np.zeros((QUARTERS, self.d_dict), np.int64)
        self.sums = Sums(QUARTERS)

    def add(
        self,
        x: Float[Tensor, "n d_model"],
        codes: Codes,
        decoded: Float[Tensor, "n d_model"],
        quarter: Int64[np.ndarray, " n"],
        center: Float[Tensor, " d_model"],
    ) -> None:
        """Add kept tokens, each of one quarter."""
        self.tokens += np.bincount(quarter, minlength=QUARTERS)
        of_entry = quarter[codes.rows().cpu().numpy()]
        place = of_entry * self.d_dict + codes.features.cpu().numpy()
        self.fired += np.bincount(place, minlength=self.fired.size).reshape(self.fired.shape)
        self.sums.add(x, decoded, codes.counts(), center, torch.from_numpy(quarter))

    @property
    def density(self) -> Float64[np.ndarray, " d_dict"]:
        """Share of tokens at which each feature is active."""
        return self.fired.sum(axis=0) / max(1, int(self.tokens.sum()))

    @property
    def density_by_quarter(self) -> Float64[np.ndarray, "quarters d_dict"]:
        """The same in each quarter; NaN in one without tokens."""
        return ratio(self.fired.astype(np.float64), np.broadcast_to(self.tokens[:, None], self.fired.shape))

    @property
    def stability(self) -> float:
        """Pearson correlation of log density between halves of the text, over features active in both.

        NaN for fewer than three such features, and where one half has all densities equal.
        """
        halves = self.fired.reshape(2, 2, -1).sum(axis=1)
        both = halves[:, (halves > 0).all(axis=0)]
        logs = np.log(both)
        if both.shape[1] < 3 or (np.ptp(logs, axis=1) == 0).any():
            return float("nan")
        centred = logs - logs.mean(axis=1, keepdims=True)
        sizes = np.square(centred).sum(axis=1)
        return float(centred.prod(axis=0).sum() / np.sqrt(sizes.prod()))

    def summary(self) -> dict[str, float]:
        """Numbers about the dictionary as a whole."""
        density, values = self.density, self.sums.values()
        active = density[density > 0]
        quartiles = np.percentile(active, (25, 50, 75)) if active.size else np.full(3, np.nan)
        return {
            "fvu": values["fvu"],
            "l0": values["l0"],
            "silent_share": float((density == 0).mean()),
            "high_frequency_share": float((density > HIGH_FREQUENCY).mean()),
            **{f"density_p{q}": float(value) for q, value in zip((25, 50, 75), quartiles, strict=True)},
            "stability": self.stability,
        }


def usage(dictionary: Dictionary, held_out: HeldOut) -> Usage:
    """:class:`Usage` over all kept tokens."""
    used, center = Usage(dictionary.d_dict), held_out.mean
    for index, x in held_out.chunks():
        codes = encode_kept(dictionary, x)
        used.add(x, codes, dictionary.decode(codes, x), held_out.quarter(index), center)
    return used


@dataclass
class Strength:
    """How strongly each feature is active, what it is worth, and how far noise moves it: sums over kept tokens."""

    dictionary: Dictionary
    sums: dict[str, Float64[Tensor, " d_dict"]] = field(init=False)

    def __post_init__(self) -> None:
        names = ("fired", "total", "largest", "worth", "moved")
        zero = torch.zeros(self.dictionary.d_dict, dtype=torch.float64, device=self.dictionary.W_dec.device)
        self.sums = {name: zero.clone() for name in names}

    def add(self, codes: Codes, error: Float[Tensor, "n d_model"], noisy: Codes) -> None:
        """Add kept tokens: their codes, what these leave unexplained, and codes of the displaced vectors."""
        sums, size = self.sums, codes.values.double().abs()
        sums["fired"].index_add_(0, codes.features, torch.ones_like(size))
        sums["total"].index_add_(0, codes.features, size)
        sums["largest"].scatter_reduce_(0, codes.features, size, "amax")
        sums["worth"] += self._worth(codes, error)
        sums["moved"] += _moved(codes, noisy)

    def columns(self, variance: float) -> dict[str, np.ndarray]:
        """mean_active, max_value, importance and sensitivity of every feature.

        :param variance: Σ‖x − x̄‖² over the same tokens.
        """
        fired, total, largest, worth, moved = (values.cpu().numpy() for values in self.sums.values())
        return {
            "mean_active": ratio(total, fired),
            "max_value": largest,
            "importance": ratio(worth, np.full_like(worth, variance)),
            "sensitivity": ratio(moved, total),
        }

    def _worth(self, codes: Codes, error: Float[Tensor, "n d_model"]) -> Float64[Tensor, " d_dict"]:
        """Σ_t (2·f·d·e + f²·‖d‖²), through one sparse product of values and errors."""
        rows, transposed = self.dictionary.W_dec, codes.by_feature()
        along = (decode_codes(transposed, error) * rows).sum(dim=1, dtype=torch.float64)
        squares = torch.zeros_like(along).index_add_(0, codes.features, codes.values.double().square())
        return 2 * along + squares * rows.double().square().sum(dim=1)


def strength(dictionary: Dictionary, held_out: HeldOut, seed: int) -> Strength:
    """:class:`Strength` over all kept tokens."""
    found = Strength(dictionary)
    for index, x in held_out.chunks():
        codes = encode_kept(dictionary, x)
        reach = NOISE * (x - held_out.mean).norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
        noisy = encode_kept(dictionary, x + reach * held_out.noise(index, seed))
        found.add(codes, x - dictionary.decode(codes, x), noisy)
    return found


def weight_columns(dictionary: Dictionary) -> tuple[dict[str, np.ndarray], float]:
    """Norms and cosines of each feature's weights, and the mean |cosine| over all pairs of decoder rows."""
    assert dictionary.W_enc is not None
    nearest, mean = own_cosines(dictionary.W_dec)
    columns: Mapping[str, Tensor] = {
        "b_enc": dictionary.b_enc,
        "encoder_norm": dictionary.W_enc.norm(dim=1),
        "decoder_norm": dictionary.W_dec.norm(dim=1),
        "enc_dec_cosine": paired_cosines(dictionary.W_enc, dictionary.W_dec),
        "nearest": nearest.index,
        "nearest_cosine": nearest.cosine,
    }
    return {name: tensor.cpu().numpy() for name, tensor in columns.items()}, mean


def _moved(codes: Codes, noisy: Codes) -> Float64[Tensor, " d_dict"]:
    """Σ_t |f(x + ε) − f(x)| of each feature; entries that only one of the codes has count whole."""
    key = torch.cat([each.rows() * each.d_dict + each.features for each in (codes, noisy)])
    value = torch.cat([codes.values.double(), -noisy.values.double()])
    keys, place = key.unique(return_inverse=True)
    change = torch.zeros(len(keys), dtype=torch.float64, device=value.device).index_add_(0, place, value)
    total = torch.zeros(codes.d_dict, dtype=torch.float64, device=value.device)
    return total.index_add_(0, keys % codes.d_dict, change.abs())

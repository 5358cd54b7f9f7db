"""Latent scaling: whether a feature that one model's decoder lacks is truly missing there (Minder et al. 2025).

A sparsity penalty can shrink a decoder row to zero although the model has the concept, more weakly (*shrunk*), or give
the concept to one feature for both models and another for one (*decoupled*). So each feature's activations f are held
against what is there: with d, its direction in the model that has it, and a target y in either model,

    β(y) = argmin over β, c of Σ ‖β·f·d + c − y‖² = cov(f, d·y) / (‖d‖² · var f),

once for the error, y = x − x̂ with the feature's own part put back, and once for the reconstruction: y = x̂ in the model
that has the feature, and x̂ without the feature's own part (what other features reconstruct) in the other. ν = β in the
other model / β in the one that has it. Of a feature that is exclusive, the other model's error holds nothing (ν_error
near 0), and neither does its reconstruction (ν_reconstruction near 0). The intercept c, which the paper has not, keeps
means from counting; the paper leaves the own part in the other model's reconstruction too. Everything is in units of
each model's own spread.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes, decode_codes
from circuitflow.dictionaries.crosscoding import Crosscoder

MIN_FIRINGS = 10
"""Tokens on which a feature has to fire for a ratio to be given."""


@dataclass(frozen=True)
class Sums:
    """What the ratios are made of, by group of blocks: enough to resample groups."""

    tokens: Float[np.ndarray, " groups"]
    fired: Float[np.ndarray, "groups d_dict"]
    first: Float[np.ndarray, "groups d_dict"]
    """Σ f."""
    second: Float[np.ndarray, "groups d_dict"]
    """Σ f²."""
    products: Float[np.ndarray, "groups targets d_dict"]
    """Σ f·(d·y) for each target."""
    along: Float[np.ndarray, "groups targets d_dict"]
    """Σ d·y."""
    own: Float[np.ndarray, "models d_dict"]
    """d·d_m: how much of the direction the feature's own decoder row has, in each model."""


@dataclass(frozen=True)
class Ratios:
    """ν of every feature, from sums over groups."""

    error: Float[np.ndarray, "... d_dict"]
    reconstruction: Float[np.ndarray, "... d_dict"]
    strength: Float[np.ndarray, "... d_dict"]
    """β of the error in the model that has the feature: 1 where the feature explains what it should."""


def gather(
    crosscoder: Crosscoder,
    batches: Iterable[tuple[int, Int64[Tensor, " n"], Mapping[str, Float[Tensor, "n d"]]]],
    means: Mapping[str, Float[Tensor, " d"]],
    scales: Mapping[str, float],
    owner: Int64[np.ndarray, " d_dict"],
    groups: int,
) -> Sums:
    """Read the rows once.

    :param batches: group, positions and vectors by site of some rows each.
    :param owner: by feature, which of the two sites has it (the larger decoder norm).
    """
    sites = crosscoder.sites
    decoders = [crosscoder.decoder(site).double() / scales[site] for site in sites]
    picked = torch.from_numpy(owner).to(decoders[0].device)[:, None]
    direction = torch.where(picked == 0, decoders[0], decoders[1])
    d_dict = crosscoder.dictionary.d_dict
    found = Sums(
        tokens=np.zeros(groups),
        fired=np.zeros((groups, d_dict)),
        first=np.zeros((groups, d_dict)),
        second=np.zeros((groups, d_dict)),
        products=np.zeros((groups, 4, d_dict)),
        along=np.zeros((groups, 4, d_dict)),
        own=np.stack([_numpy((direction * decoder).sum(dim=1)) for decoder in decoders]),
    )
    for group, positions, x in batches:
        joined = torch.cat([x[site] for site in sites], dim=1)
        codes = crosscoder.dictionary.encode(joined, positions)
        _add_features(found, group, codes)
        decoded = crosscoder.dictionary.decode(codes)
        for place, site in enumerate(sites):
            centred = (x[site].double() - means[site]) / scales[site]
            rebuilt = (crosscoder.part(decoded, site).double() - means[site]) / scales[site]
            for kind, target in enumerate((centred - rebuilt, rebuilt)):
                _add_target(found, group, 2 * kind + place, codes, target, direction)
    return found


def _add_features(found: Sums, group: int, codes: Codes) -> None:
    features = codes.features.cpu().numpy()
    values = codes.values.double().cpu().numpy()
    found.tokens[group] += codes.n
    for total, weights in ((found.fired, None), (found.first, values), (found.second, values**2)):
        total[group] += np.bincount(features, weights, minlength=codes.d_dict)


def _add_target(
    found: Sums, group: int, which: int, codes: Codes, target: Float[Tensor, "n d"], direction: Tensor
) -> None:
    """Σ f·(d·y) is d·(Σ f·y): one sparse product for all features."""
    columns = codes.by_feature().to(torch.float64)
    weighted = decode_codes(columns, target)
    found.products[group, which] += _numpy((weighted * direction).sum(dim=1))
    found.along[group, which] += _numpy(direction @ target.sum(dim=0))


def ratios(
    sums: Sums, owner: Int64[np.ndarray, " d_dict"], weights: Float[np.ndarray, "draws groups"] | None = None
) -> Ratios:
    """ν of every feature; ``weights`` say how often each group counts (a bootstrap's draws), once by default.

    NaN for features that fire on fewer than :data:`MIN_FIRINGS` tokens, or hardly vary.
    """
    w = np.ones((1, len(sums.tokens))) if weights is None else weights
    n, fired = w @ sums.tokens, w @ sums.fired
    first, second = w @ sums.first, w @ sums.second
    variance = second - first**2 / n[:, None]

    def covariance(which: int) -> np.ndarray:
        return w @ sums.products[:, which] - first * (w @ sums.along[:, which]) / n[:, None]

    own = [sums.own[model] * variance for model in (0, 1)]
    error = [covariance(model) + own[model] for model in (0, 1)]
    others = [covariance(2 + model) - own[model] for model in (0, 1)]
    has = owner == 0
    usable = (fired >= MIN_FIRINGS) & (variance > 0)
    error_has, error_other = np.where(has, error[0], error[1]), np.where(has, error[1], error[0])
    whole = np.where(has, others[0] + own[0], others[1] + own[1])
    other = np.where(has, others[1], others[0])
    norm = np.where(has, sums.own[0], sums.own[1]) * variance
    found = Ratios(
        error=_ratio(error_other, error_has, usable),
        reconstruction=_ratio(other, whole, usable),
        strength=_ratio(error_has, norm, usable),
    )
    return (
        found if weights is not None else Ratios(found.error[0], found.reconstruction[0], found.strength[0])
    )


def intervals(
    sums: Sums, owner: Int64[np.ndarray, " d_dict"], draws: int, seed: int
) -> dict[str, Float[np.ndarray, "2 d_dict"]]:
    """95 % intervals of both ratios from a bootstrap over groups of blocks, by name; NaN where a ratio is not known."""
    groups = len(sums.tokens)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=draws).astype(np.float64)
    kept: dict[str, list[np.ndarray]] = {"error": [], "reconstruction": []}
    step = max(1, (1 << 20) // draws)
    for start in range(0, len(owner), step):
        part = slice(start, start + step)
        drawn = ratios(_features(sums, part), owner[part], weights)
        for name, columns in kept.items():
            columns.append(_percentiles(getattr(drawn, name)))
    return {name: np.concatenate(columns, axis=1) for name, columns in kept.items()}


def _features(sums: Sums, part: slice) -> Sums:
    return Sums(
        sums.tokens,
        sums.fired[:, part],
        sums.first[:, part],
        sums.second[:, part],
        sums.products[:, :, part],
        sums.along[:, :, part],
        sums.own[:, part],
    )


def _percentiles(drawn: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, "2 n"]:
    """Of the draws in which the ratio is known; NaN where it is known in less than half of them."""
    known = np.isfinite(drawn).mean(axis=0) >= 0.5
    found = np.full((2, drawn.shape[1]), np.nan)
    if known.any():
        found[:, known] = np.nanpercentile(drawn[:, known], [2.5, 97.5], axis=0)
    return found


def _ratio(above: np.ndarray, below: np.ndarray, usable: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=usable & (below > 0))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()

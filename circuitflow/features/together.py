"""Features side by side: how their activations correlate, and where in a stretch of text they fire."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.features.held_out import HeldOut, Words, encode_kept

STRETCH = 60
"""Tokens of the heat map."""

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Together:
    """What a few features do together on kept tokens."""

    correlation: Float64[np.ndarray, "m m"]
    block: int
    """The held-out block in whose first tokens most of the features fire; the earliest of several."""
    values: Float64[np.ndarray, "m stretch"]
    """Values at these tokens, 0 where inactive or where the token is an outlier."""


def together(dictionary: Dictionary, held_out: HeldOut, features: Int64[np.ndarray, " m"]) -> Together:
    """Correlations and a heat map of a few features, in one pass."""
    m, rows = len(features), held_out.rows
    length = min(STRETCH, rows.block)
    n, total, products = 0, np.zeros(m), np.zeros((m, m))
    blocks = rows.held_out_blocks
    starts = np.zeros((len(blocks), length, m), np.float32)
    chosen = torch.from_numpy(features).to(held_out.device)
    for index, x in held_out.chunks():
        columns = encode_kept(dictionary, x).columns(chosen)
        values, wide = columns.cpu().numpy(), columns.double()
        n += len(values)
        total += wide.sum(dim=0).cpu().numpy()
        products += (wide.T @ wide).cpu().numpy()
        early = index % rows.block < length
        starts[np.searchsorted(blocks, index[early] // rows.block), index[early] % rows.block] = values[early]
    active = (starts != 0).any(axis=1).sum(axis=1)
    best = int(active.argmax()) if m else 0
    return Together(_correlation(n, total, products), int(blocks[best]), starts[best].T.astype(np.float64))


def correlation_columns(found: Together, features: Int64[np.ndarray, " m"]) -> Columns:
    """The table ``correlation``."""
    m = len(features)
    return {
        "feature_a": np.repeat(features, m),
        "feature_b": np.tile(features, m),
        "correlation": found.correlation.ravel(),
    }


def heatmap_columns(found: Together, features: Int64[np.ndarray, " m"], words: Words) -> Columns:
    """The table ``heatmap``."""
    m, length = found.values.shape
    positions = np.arange(length)
    tokens = np.array(words.at(found.block, positions), dtype=object)
    return {
        "feature": np.repeat(features, length),
        "block": np.full(m * length, found.block, np.int64),
        "position": np.tile(positions, m),
        "token": np.tile(tokens, m),
        "value": found.values.ravel(),
    }


def _correlation(n: int, total: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Pearson correlations from sums; NaN for a feature that is constant."""
    means = total / max(n, 1)
    covariance = products / max(n, 1) - np.outer(means, means)
    # a feature that is constant leaves a rounding error of its mean square
    spread = np.where(
        np.diag(covariance) > 1e-12 * np.diag(products) / max(n, 1), np.diag(covariance), np.nan
    )
    return np.clip(covariance / np.sqrt(np.outer(spread, spread)), -1, 1)

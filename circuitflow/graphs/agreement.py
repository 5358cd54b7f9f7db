"""How well graphs predict interventions: correlation and slope of measured on predicted effects, with intervals."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from circuitflow.attribution.intervals import INTERVAL

MEASURES = ("pearson", "slope")
ALL = "all"
"""Kind of the rows that tell of interventions of every kind."""
LEAST = 3
"""A regression of fewer effects says nothing."""

CONVENTION = (
    "measured on predicted effects, least squares with an intercept; 95 % intervals from a bootstrap over "
    "interventions; r of 1 and slope of 1 are right"
)


def agreement(effects: Mapping[str, Any], draws: int, seed: int) -> dict[str, list[Any]]:
    """Pearson's r and the slope of measured on predicted effects, by mode, kind of target and of intervention.

    :param effects: columns intervention, kind, mode, target, measured, predicted; rows without a finite value of both
        do not count. One name can be of two interventions of different kinds.
    """
    table = {
        name: np.asarray(effects[name])
        for name in ("intervention", "kind", "mode", "target", "measured", "predicted")
    }
    known = np.ones(len(table["mode"]), dtype=bool)
    for name in ("predicted", "measured"):
        known &= np.isfinite(table[name].astype(np.float64))
    columns: dict[str, list[Any]] = {name: [] for name in ("mode", "target", "kind", "n", "interventions")}
    columns |= {f"{name}{end}": [] for name in MEASURES for end in ("", "_low", "_high")}
    kinds = [ALL, *dict.fromkeys(table["kind"].tolist())]
    for mode, target, kind in product(dict.fromkeys(table["mode"].tolist()), ("logit", "feature"), kinds):
        here = known & (table["mode"] == mode) & (table["target"] == target)
        here &= (table["kind"] == kind) | (kind == ALL)
        pairs = list(zip(table["kind"][here].tolist(), table["intervention"][here].tolist(), strict=True))
        place = {pair: number for number, pair in enumerate(sorted(set(pairs)))}
        group = np.array([place[pair] for pair in pairs], dtype=np.int64)
        x, y = table["predicted"][here].astype(float), table["measured"][here].astype(float)
        row = {
            "mode": mode,
            "target": target,
            "kind": kind,
            "n": int(here.sum()),
            "interventions": len(place),
        }
        row |= _with_intervals(x, y, group, len(place), draws, seed)
        for name, value in row.items():
            columns[name].append(value)
    return columns


def _with_intervals(
    x: np.ndarray, y: np.ndarray, group: np.ndarray, groups: int, draws: int, seed: int
) -> dict[str, float]:
    found: dict[str, float] = {}
    sums = _sums(x, y, group, groups)
    picked = np.random.default_rng(seed).integers(0, max(groups, 1), (draws, groups))
    counts = (
        np.stack([np.bincount(row, minlength=groups) for row in picked]) if groups else np.zeros((draws, 0))
    )
    whole, drawn = fit(sums.sum(0)), fit(counts @ sums)
    for name, value, resampled in zip(MEASURES, whole, drawn, strict=True):
        usable = resampled[np.isfinite(resampled)]
        enough = groups > 1 and len(usable) > draws // 2
        low, high = np.percentile(usable, INTERVAL) if enough else (np.nan, np.nan)
        found |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _sums(x: np.ndarray, y: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """(groups, 6): n, Σx, Σy, Σx², Σy², Σxy of every intervention, from which every resample's fit follows."""
    parts = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = [np.bincount(group, weights=part, minlength=groups) for part in parts]
    return np.stack(sums, axis=1) if groups else np.zeros((0, 6))


def fit(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pearson's r and slope from n, Σx, Σy, Σx², Σy², Σxy along the last axis; NaN where they are not defined."""
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        both, first, second = xy - x * y / n, xx - x * x / n, yy - y * y / n
        # What is left of equal values after rounding is no variance.
        flat = (first <= 1e-12 * xx) | (second <= 1e-12 * yy) | (n < LEAST)
        r = np.where(flat, np.nan, both / np.sqrt(first * second))
        slope = np.where((first <= 1e-12 * xx) | (n < LEAST), np.nan, both / first)
    return np.clip(r, -1, 1), slope

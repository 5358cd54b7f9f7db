"""The tables of faithfulness: one row per circuit, per circuit and prompt, and per curve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from circuitflow.attribution.intervals import interval
from circuitflow.circuits.columns import Columns, ordered, stacked
from circuitflow.circuits.conditions import Candidate, Condition
from circuitflow.circuits.statistics import areas, bootstrap, faithfulness, outlying, resampled
from circuitflow.data.token_pairs import TokenPairs

CURVES = ("circuit", "complement", "neurons")
"""Series that grow by strength, so that they have an area."""

LEAST = {"cpr": -np.inf, "cmd": 0.0}
"""What an area cannot fall below."""


@dataclass(frozen=True)
class Found:
    """What one condition gave."""

    condition: Condition
    candidates: Sequence[Candidate]
    values: Float[np.ndarray, "candidates n"]
    """m(C) of every prompt."""
    empty: Float[np.ndarray, " n"]
    full: Float[np.ndarray, " n"]
    ranked: int
    """Nodes that the condition's circuits are chosen from."""
    share_counts: frozenset[int]
    """Sizes that the areas are taken over, as numbers of chosen nodes."""


def circuit_rows(found: Found, params: Mapping[str, Any]) -> Columns:
    """One row per circuit and aggregate, the wanted aggregate first."""
    parts = [_circuit_rows(found, aggregate, params) for aggregate in ordered(params["aggregate"])]
    return stacked(parts)


def _circuit_rows(found: Found, aggregate: str, params: Mapping[str, Any]) -> Columns:
    candidates, empty, full = found.candidates, found.empty, found.full
    how = (empty, full, aggregate)
    low, high = bootstrap(found.values, *how, params["bootstrap"], params["seed"])
    size = len(candidates)
    return {
        **_named(candidates),
        **_said(found.condition, size, aggregate == params["aggregate"]),
        "aggregate": [aggregate] * size,
        "F": faithfulness(found.values, *how),
        "low": low,
        "high": high,
        "m_circuit": found.values.mean(1),
        "m_empty": np.full(size, empty.mean()),
        "m_full": np.full(size, full.mean()),
        "n": np.full(size, len(full), np.int64),
    }


def prompt_rows(found: Found, pairs: TokenPairs) -> Columns:
    """One row per prompt and circuit, random circuits left out; F is the prompt's own ratio."""
    kept = [number for number, one in enumerate(found.candidates) if one.series != "random"]
    candidates, values = [found.candidates[number] for number in kept], found.values[kept]
    n, empty, full = len(found.full), found.empty, found.full
    F = faithfulness(values[..., None], empty[:, None], full[:, None], "ratio_of_means")
    outliers = np.array([outlying(row) for row in F]).reshape(len(kept), n)
    named = {
        name: np.repeat(np.array(column, object), n).tolist() for name, column in _named(candidates).items()
    }
    return {
        **named,
        **_said(found.condition, len(kept) * n, True),
        "pair": np.tile(pairs.pair.cpu().numpy(), len(kept)),
        "case": pairs.case * len(kept),
        "m_circuit": values.ravel(),
        "m_empty": np.tile(empty, len(kept)),
        "m_full": np.tile(full, len(kept)),
        "F": F.ravel(),
        "outlier": outliers.ravel(),
    }


def area_rows(found: Found, params: Mapping[str, Any]) -> Columns:
    """One row per curve and aggregate: CPR and CMD with intervals over prompts.

    A resample's |1 − F| is on average larger than the sample's; the intervals are moved so that they hold the estimate.
    """
    rows: list[dict[str, Any]] = []
    for series in CURVES:
        chosen = [
            (round(one.share * found.ranked), number)
            for number, one in enumerate(found.candidates)
            if one.series == series and one.share == one.share
        ]
        places = [number for size, number in sorted(chosen) if size in found.share_counts]
        if len(places) < 2:
            continue
        shares = np.array([found.candidates[number].share for number in places])
        for aggregate in ordered(params["aggregate"]):
            how = (found.values[places], found.empty, found.full, aggregate)
            estimate = areas(shares, faithfulness(*how))
            drawn = areas(shares, resampled(*how, params["bootstrap"], params["seed"]))
            said = {name: column[0] for name, column in _said(found.condition, 1, True).items()}
            row = {
                "series": series,
                **said,
                "main": found.condition.main and aggregate == params["aggregate"],
            }
            row |= {"aggregate": aggregate, "candidates": found.ranked, "points": len(places)}
            row |= {"first_share": float(shares[0]), "last_share": float(shares[-1])}
            for name, value, draws in zip(("cpr", "cmd"), estimate, drawn, strict=True):
                low, high = interval(draws, float(value), (LEAST[name], np.inf))
                row |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
            rows.append(row | {"n": len(found.full)})
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _named(candidates: Sequence[Candidate]) -> Columns:
    return {
        "series": [one.series for one in candidates],
        "source": [one.source for one in candidates],
        "threshold": [one.threshold for one in candidates],
        "nodes": [len(one.nodes) for one in candidates],
        "share": [one.share for one in candidates],
        "draw": [one.draw for one in candidates],
    }


def _said(condition: Condition, size: int, wanted: bool) -> Columns:
    return {
        "ablation": [condition.ablation] * size,
        "start": [condition.start] * size,
        "errors": [condition.errors] * size,
        "main": [condition.main and wanted] * size,
    }

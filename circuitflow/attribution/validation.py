"""Scores against the truth: true patching effects of single nodes regressed on their scores, site by site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.intervals import INTERVAL, correlation, interval
from circuitflow.attribution.methods import UNSIGNED, Scores, per_pair, read_scores
from circuitflow.attribution.nodes import kinds
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.store.arrays import open_store
from circuitflow.store.tables import read_table, write_table

TRUTH = "exact"
EVERYWHERE = "all"
"""Site of the rows that tell of the nodes of all sites together."""
MEASURES = ("pearson", "slope", "intercept")
LEAST_NODES = 3
"""A regression of fewer says nothing."""

CONVENTIONS = {
    "effect": "(m patched - m clean) / (m corrupt - m clean): the node alone patched into the clean run; m corrupt is "
    "the whole patched run's",
    "score": "the method's estimate of the numerator over the same denominator: slope 1 and intercept 0 are right",
    "slope": "of the effect on the score, least squares with an intercept",
    "nodes": "those that were patched: the error and the strongest features by AtP on train, hence no random sample",
    "intervals": "95 %, pairs resampled for effects and scores together",
}

Columns = dict[str, np.ndarray]
Nodes = list[tuple[int, int]]


@dataclass(frozen=True)
class Site:
    """The nodes of one site that were patched."""

    name: str
    nodes: Nodes
    effects: dict[str, np.ndarray]
    """By method, the truth among them: (pairs, nodes), in units of the metric; 0 where a node does not change."""


def validate_scores(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. How well scores predict what patching a node truly does.

    Inputs ``scores_{method}`` and ``pairs_{method}`` (lists of tables, in the order of ``sites``) of the methods and of
    "exact", ``tokens`` (table of the split's pairs) and ``gradients`` (store: the metric of both runs); params
    ``sites``, ``methods``, ``aggregate`` (ratio_of_means | mean_of_ratios: whether pairs are averaged before or after
    the division), ``seed``, optionally ``split`` (train by default), ``bootstrap`` (resamples, 1000 by default).

    Outputs ``validation``: site ("all": every site together), method, kind (feature | error | both), n (nodes), pairs,
    and pearson, slope, intercept with ``_low`` and ``_high``; ``nodes``: site, method, kind, feature, position, score,
    effect, low, high (interval of the effect). Both score and effect are shares of the whole effect of patching.

    :raises UserError: no method has effects per pair, or patching everything does not change the metric.
    """
    methods = [name for name in params["methods"] if name not in (*UNSIGNED, TRUTH)]
    if not methods:
        raise UserError(
            "Validation needs a method that estimates effects (atp, ig, relp, sae_in_loop) beside exact; "
            "add one to scores.compare."
        )
    pair = read_table(Path(inputs["tokens"]))["pair"].tolist()
    store = open_store(Path(inputs["gradients"]))
    total = store.read("metric/patched").astype(np.float64) - store.read("metric/clean").astype(np.float64)
    sites = []
    for number, name in enumerate(params["sites"]):
        read = {method: read_scores(inputs, method, number, params) for method in (*methods, TRUTH)}
        sites.append(_site(name, read, pair))
        progress("sites read", number + 1, len(params["sites"]))
    counts = _resamples(len(pair), params)
    rows = [
        _regressions(name, method, nodes, sides, total, counts, params["aggregate"])
        for method in methods
        for name, nodes, sides in [
            *((site.name, site.nodes, site.effects) for site in sites),
            _together(sites),
        ]
    ]
    points = [
        _points(site, method, total, counts, params["aggregate"]) for site in sites for method in methods
    ]
    facts = {
        **out.provenance,
        "conventions": {**CONVENTIONS, "aggregate": params["aggregate"]},
        "reference": TRUTH,
    }
    write_table(out.files["validation"], _stacked(rows), facts)
    write_table(out.files["nodes"], _stacked(points), facts)


def shares(effects: np.ndarray, total: np.ndarray, counts: np.ndarray, aggregate: str) -> np.ndarray:
    """Effects (pairs, nodes) as shares of the whole effect (pairs,), for every resample: (draws, nodes).

    :param counts: (draws, pairs), how often each pair is in a resample.
    :raises UserError: the whole effect is 0, so that there is nothing to take a share of.
    """
    n = counts.sum(1, keepdims=True)
    if aggregate == "mean_of_ratios":
        if not np.all(total):
            raise UserError(
                "In some pair patching everything leaves the metric as it is, so its share is not defined; "
                "set evaluation.aggregate to ratio_of_means."
            )
        return np.asarray(counts @ (effects / total[:, None]) / n)
    whole = counts @ total
    if not np.all(whole):
        raise UserError(
            "Patching everything leaves the metric as it is, so no node has a share of its effect; "
            "validate on pairs whose prompts differ."
        )
    return np.asarray(counts @ effects / whole[:, None])


def line(score: np.ndarray, effect: np.ndarray) -> dict[str, float]:
    """Pearson's r, and slope and intercept of ``effect`` on ``score`` by least squares; NaN for too few nodes."""
    if len(score) < LEAST_NODES:
        return dict.fromkeys(MEASURES, float("nan"))
    centred = score - score.mean()
    size = float(centred @ centred)
    slope = float(centred @ effect) / size if size > 0 else float("nan")
    return {
        "pearson": correlation(score, effect),
        "slope": slope,
        "intercept": float(effect.mean() - slope * score.mean()),
    }


def _site(name: str, read: Mapping[str, Scores], pair: Sequence[int]) -> Site:
    nodes = sorted(read[TRUTH].mean)
    place = {node: index for index, node in enumerate(nodes)}
    row = {number: index for index, number in enumerate(pair)}
    return Site(
        name, nodes, {method: per_pair(scores, place, row, len(pair)) for method, scores in read.items()}
    )


def _together(sites: Sequence[Site]) -> tuple[str, Nodes, dict[str, np.ndarray]]:
    effects = {
        method: np.concatenate([site.effects[method] for site in sites], 1) for method in sites[0].effects
    }
    return EVERYWHERE, [node for site in sites for node in site.nodes], effects


def _resamples(pairs: int, params: Mapping[str, Any]) -> np.ndarray:
    generator = np.random.default_rng(params["seed"])
    counts = generator.multinomial(pairs, np.full(pairs, 1 / pairs), size=params.get("bootstrap", 1000))
    return np.asarray(counts, np.float64)


def _regressions(
    site: str,
    method: str,
    nodes: Nodes,
    effects: Mapping[str, np.ndarray],
    total: np.ndarray,
    counts: np.ndarray,
    aggregate: str,
) -> Columns:
    """Rows of both kinds of node together and of each alone."""
    everyone = np.ones((1, len(total)))
    score, effect = (shares(effects[name], total, everyone, aggregate)[0] for name in (method, TRUTH))
    drawn = [shares(effects[name], total, counts, aggregate) for name in (method, TRUTH)]
    kind = kinds(np.array([feature for feature, _ in nodes], np.int64))
    rows = []
    for wanted in ("both", "feature", "error"):
        here = np.ones(len(nodes), bool) if wanted == "both" else kind == wanted
        found = line(score[here], effect[here])
        draws = [line(s[here], e[here]) for s, e in zip(*drawn, strict=True)]
        row: dict[str, Any] = {"site": site, "method": method, "kind": wanted, "n": int(here.sum())}
        row["pairs"] = len(total)
        for name in MEASURES:
            bounds = (-1.0, 1.0) if name == "pearson" else (-np.inf, np.inf)
            low, high = interval(np.array([draw[name] for draw in draws]), found[name], bounds)
            row |= {name: found[name], f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return {name: np.array([row[name] for row in rows], _kind(rows[0][name])) for name in rows[0]}


def _points(site: Site, method: str, total: np.ndarray, counts: np.ndarray, aggregate: str) -> Columns:
    everyone = np.ones((1, len(total)))
    feature, position = np.array(site.nodes, np.int64).reshape(-1, 2).T
    low, high = np.percentile(shares(site.effects[TRUTH], total, counts, aggregate), INTERVAL, axis=0)
    return {
        "site": np.full(len(feature), site.name, object),
        "method": np.full(len(feature), method, object),
        "kind": kinds(feature),
        "feature": feature,
        "position": position,
        "score": shares(site.effects[method], total, everyone, aggregate)[0],
        "effect": shares(site.effects[TRUTH], total, everyone, aggregate)[0],
        "low": low,
        "high": high,
    }


def _kind(value: object) -> Any:
    return object if isinstance(value, str) else type(value)


def _stacked(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

"""Which nodes matter most at each site, whether the test pairs agree, and how much of the effect each site carries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.nodes import kinds
from circuitflow.jobs import Output, progress
from circuitflow.store.tables import read_table, write_table

Columns = dict[str, np.ndarray]

DRAWS_AT_ONCE = 100
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap that every ``low`` and ``high`` is."""

STATISTICS = ("score", "se", "absolute", "activity")
QUANTITIES = ("features", "error", "features_abs", "error_abs")


@dataclass(frozen=True)
class SiteNodes:
    """The nodes of one site that change in either split, and what the score tables say of them.

    Nodes are ordered by feature number, the error last; a node that does not change in a split scores 0 there.
    """

    site: str
    kind: np.ndarray
    feature: np.ndarray
    statistics: dict[tuple[str, str], np.ndarray]
    """(statistic, split) → one value per node."""
    per_pair: dict[str, np.ndarray]
    """split → effects (pairs, nodes) in float64; no rows if the method gives none per pair."""
    n: dict[str, int]

    def score(self, split: str) -> np.ndarray:
        """Mean effect per node."""
        return self.statistics["score", split]


def rank_features(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Rank the nodes of every site and compare the splits.

    Inputs ``scores`` and ``pairs`` (lists of tables of score_nodes, in the order of ``sites``); params ``sites``,
    ``overlap_at`` (list of k), ``seed``, optionally ``bootstrap`` (resamples, 1000 by default). Outputs:

    - ``nodes``: site, kind, feature, rank, rank_test, and score, se, absolute, activity as ``{name}_{split}``.
      Rank 1 has the largest |score| on train at its site, whether it is a feature or the error.
    - ``agreement``: site, k, overlap, low, high, spearman, spearman_low, spearman_high, nodes. ``overlap`` is the
      share of the train split's top k by |score| that is among the test split's; ``spearman`` correlates |score|
      over all nodes of the site (one value per site). Intervals resample test pairs; a resample is noisier than
      the sample, so both quantities tend to lie in the upper part of their intervals.
    - ``layers``: site, split, n, and Σ score (``features``, ``error``) and Σ |score| (``features_abs``,
      ``error_abs``) with intervals ``_low`` and ``_high`` over resampled pairs.
    """
    nodes: list[Columns] = []
    agreement: list[Columns] = []
    layers: list[Columns] = []
    sites = list(params["sites"])
    for number, site in enumerate(sites):
        found = read_site(site, Path(inputs["scores"][number]), Path(inputs["pairs"][number]))
        draws = {split: _resamples(found, split, params) for split in ("train", "test")}
        nodes.append(_ranked(found))
        agreement.append(_agreement(found, params["overlap_at"], draws["test"]))
        layers.extend(_importance(found, split, draws[split]) for split in ("train", "test"))
        progress("ranking sites", number + 1, len(sites))
    for name, parts in (("nodes", nodes), ("agreement", agreement), ("layers", layers)):
        columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        write_table(out.files[name], columns, out.provenance)


def read_site(site: str, scores: Path, pairs: Path) -> SiteNodes:
    """Join the splits of one site's score tables."""
    table, effects = read_table(scores), read_table(pairs)
    place = {node: index for index, node in enumerate(_in_order(table["feature"]))}
    feature = np.array(list(place), np.int64)
    statistics, per_pair, n = {}, {}, {}
    for split in ("train", "test"):
        here = table["split"] == split
        index = [place[node] for node in table["feature"][here]]
        for name in STATISTICS:
            statistics[name, split] = np.zeros(len(feature))
            statistics[name, split][index] = table[name][here]
        n[split] = int(table["n"][here].max(initial=0))
        per_pair[split] = _matrix(effects, split, place, n[split])
    return SiteNodes(site, kinds(feature), feature, statistics, per_pair, n)


def _in_order(features: np.ndarray) -> list[int]:
    """Different feature numbers ascending, the error (−1) last."""
    different = np.unique(features)
    return [*different[different >= 0].tolist(), *different[different < 0].tolist()]


def _matrix(effects: Columns, split: str, place: Mapping[int, int], n: int) -> np.ndarray:
    here = effects["split"] == split
    if not here.any():
        return np.zeros((0, len(place)))
    _, row = np.unique(effects["pair"][here], return_inverse=True)
    dense = np.zeros((n, len(place)))  # pairs in which no node changes have no entries, and come last
    dense[row, [place[node] for node in effects["feature"][here]]] = effects["score"][here]
    return dense


def _resamples(nodes: SiteNodes, split: str, params: Mapping[str, Any]) -> np.ndarray:
    """Mean scores (draws, nodes) of resampled pairs; the same pairs are drawn for every site."""
    effects = nodes.per_pair[split]
    n = len(effects)
    if n == 0:
        return np.full((1, len(nodes.feature)), np.nan)
    generator = np.random.default_rng([params["seed"], ("train", "test").index(split)])
    counts = generator.multinomial(n, np.full(n, 1 / n), size=params.get("bootstrap", 1000))
    return np.concatenate(
        [part @ effects / n for part in np.split(counts, range(DRAWS_AT_ONCE, len(counts), DRAWS_AT_ONCE))]
    )


def _ranked(nodes: SiteNodes) -> Columns:
    order = _falling(nodes.score("train"))
    rank_test = np.empty(len(order), np.int64)
    rank_test[_falling(nodes.score("test"))] = np.arange(1, len(order) + 1)
    columns: Columns = {
        "site": np.full(len(order), nodes.site, object),
        "kind": nodes.kind[order],
        "feature": nodes.feature[order],
        "rank": np.arange(1, len(order) + 1),
        "rank_test": rank_test[order],
    }
    for name in STATISTICS:
        for split in ("train", "test"):
            columns[f"{name}_{split}"] = nodes.statistics[name, split][order]
    return columns


def _agreement(nodes: SiteNodes, overlap_at: Sequence[int], draws: np.ndarray) -> Columns:
    train, test = np.abs(nodes.score("train")), np.abs(nodes.score("test"))
    ks = sorted({min(k, len(train)) for k in overlap_at})
    top = {k: _falling(train)[:k] for k in ks}
    drawn_orders = np.argsort(-np.abs(draws), axis=1, kind="stable")
    spearman = rank_correlation(train, test[None])[0]
    spread = _interval(rank_correlation(train, np.abs(draws)))
    overlaps = {k: np.isin(drawn_orders[:, :k], top[k]).mean(1) for k in ks}
    known = not np.isnan(draws).any()
    low_high = [_interval(overlaps[k]) if known else (np.nan, np.nan) for k in ks]
    return {
        "site": np.full(len(ks), nodes.site, object),
        "k": np.array(ks, np.int64),
        "overlap": np.array([np.isin(_falling(test)[:k], top[k]).mean() for k in ks]),
        "low": np.array([low for low, _ in low_high]),
        "high": np.array([high for _, high in low_high]),
        "spearman": np.full(len(ks), spearman),
        "spearman_low": np.full(len(ks), spread[0]),
        "spearman_high": np.full(len(ks), spread[1]),
        "nodes": np.full(len(ks), len(train), np.int64),
    }


def _importance(nodes: SiteNodes, split: str, draws: np.ndarray) -> Columns:
    columns: Columns = {
        "site": np.array([nodes.site], object),
        "split": np.array([split], object),
        "n": np.array([nodes.n[split]], np.int64),
    }
    for quantity in QUANTITIES:
        members = nodes.kind == ("error" if quantity.startswith("error") else "feature")
        size = np.abs if quantity.endswith("abs") else np.asarray
        low, high = _interval(size(draws[:, members]).sum(1))
        columns[quantity] = np.array([size(nodes.score(split)[members]).sum()])
        columns[f"{quantity}_low"], columns[f"{quantity}_high"] = np.array([low]), np.array([high])
    return columns


def _falling(scores: np.ndarray) -> np.ndarray:
    """Indices from the largest |score| down; ties in the order given."""
    return np.argsort(-np.abs(scores), kind="stable")


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, INTERVAL)
    return float(low), float(high)


def rank_correlation(fixed: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's correlation of one list (n,) with each of several (m, n); ties share a rank, constants give NaN."""
    first = _centred_ranks(fixed)
    result = np.full(len(others), np.nan)
    for index, other in enumerate(others):
        second = _centred_ranks(other)
        size = float(np.sqrt((first @ first) * (second @ second)))
        if size > 0:
            result[index] = first @ second / size
    return result


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place] - (len(values) + 1) / 2

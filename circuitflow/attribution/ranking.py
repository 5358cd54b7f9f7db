"""Which nodes matter most at each site, whether the test pairs agree, and how much of the effect each site carries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.intervals import falling, interval, overlap, rank_correlation
from circuitflow.attribution.nodes import kinds, strength
from circuitflow.jobs import Output, progress
from circuitflow.store.tables import read_table, write_table

Columns = dict[str, np.ndarray]

DRAWS_AT_ONCE = 100
STATISTICS = ("score", "se", "absolute", "activity")
QUANTITIES = ("features", "error", "features_abs", "error_abs")


@dataclass(frozen=True)
class SiteNodes:
    """The nodes of one site that change in either split, and what the score tables say of them.

    Nodes are ordered by feature number and position, errors last; a node that does not change in a split scores 0
    there.
    """

    site: str
    kind: np.ndarray
    feature: np.ndarray
    position: np.ndarray
    """SUMMED (−1) for nodes that stand for all positions."""
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
    ``overlap_at`` (list of k), ``seed``, optionally ``bootstrap`` (resamples, 1000 by default) and ``ranking``
    ("absolute" by default: the strength of a node is |score|; "signed": the score itself). Outputs:

    - ``nodes``: site, kind, feature, position, rank, rank_test, and score, se, absolute, activity as
      ``{name}_{split}``. Rank 1 is the strongest on train at its site, whether it is a feature or the error.
    - ``agreement``: site, k, overlap, low, high, spearman, spearman_low, spearman_high, nodes. ``overlap`` is the
      share of the train split's k strongest that is among the test split's; ``spearman`` correlates the strengths of
      all nodes of the site (one value per site). Intervals resample test pairs.
    - ``layers``: site, split, n, and Σ score (``features``, ``error``) and Σ |score| (``features_abs``,
      ``error_abs``) with intervals ``_low`` and ``_high`` over resampled pairs.

    Intervals are those of :func:`circuitflow.attribution.intervals.interval`.
    """
    nodes: list[Columns] = []
    agreement: list[Columns] = []
    layers: list[Columns] = []
    sites, ranking = list(params["sites"]), params.get("ranking", "absolute")
    for number, site in enumerate(sites):
        found = read_site(site, Path(inputs["scores"][number]), Path(inputs["pairs"][number]))
        draws = {split: _resamples(found, split, params) for split in ("train", "test")}
        nodes.append(_ranked(found, ranking))
        agreement.append(_agreement(found, params["overlap_at"], draws["test"], ranking))
        layers.extend(_importance(found, split, draws[split]) for split in ("train", "test"))
        progress("ranking sites", number + 1, len(sites))
    for name, parts in (("nodes", nodes), ("agreement", agreement), ("layers", layers)):
        columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        write_table(out.files[name], columns, {**out.provenance, "conventions": {"ranking": ranking}})


def read_site(site: str, scores: Path, pairs: Path) -> SiteNodes:
    """Join the splits of one site's score tables."""
    table, effects = read_table(scores), read_table(pairs)
    nodes = _in_order(table)
    place = {node: index for index, node in enumerate(nodes)}
    statistics, per_pair, n = {}, {}, {}
    for split in ("train", "test"):
        here = table["split"] == split
        index = _places(table, here, place)
        for name in STATISTICS:
            statistics[name, split] = np.zeros(len(nodes))
            statistics[name, split][index] = table[name][here]
        n[split] = int(table["n"][here].max(initial=0))
        per_pair[split] = _matrix(effects, split, place, n[split])
    feature, position = np.array(nodes, np.int64).reshape(-1, 2).T
    return SiteNodes(site, kinds(feature), feature, position, statistics, per_pair, n)


Node = tuple[int, int]
"""Feature number and position."""


def _in_order(table: Columns) -> list[Node]:
    """Different nodes by feature number and position, errors (−1) last."""
    different = sorted(set(zip(table["feature"].tolist(), table["position"].tolist(), strict=True)))
    return sorted(different, key=lambda node: node[0] < 0)


def _places(table: Columns, here: np.ndarray, place: Mapping[Node, int]) -> list[int]:
    nodes = zip(table["feature"][here].tolist(), table["position"][here].tolist(), strict=True)
    return [place[node] for node in nodes]


def _matrix(effects: Columns, split: str, place: Mapping[Node, int], n: int) -> np.ndarray:
    here = effects["split"] == split
    if not here.any():
        return np.zeros((0, len(place)))
    _, row = np.unique(effects["pair"][here], return_inverse=True)
    dense = np.zeros((n, len(place)))  # pairs in which no node changes have no entries, and come last
    dense[row, _places(effects, here, place)] = effects["score"][here]
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


def _ranked(nodes: SiteNodes, ranking: str) -> Columns:
    order = falling(strength(nodes.score("train"), ranking))
    rank_test = np.empty(len(order), np.int64)
    rank_test[falling(strength(nodes.score("test"), ranking))] = np.arange(1, len(order) + 1)
    columns: Columns = {
        "site": np.full(len(order), nodes.site, object),
        "kind": nodes.kind[order],
        "feature": nodes.feature[order],
        "position": nodes.position[order],
        "rank": np.arange(1, len(order) + 1),
        "rank_test": rank_test[order],
    }
    for name in STATISTICS:
        for split in ("train", "test"):
            columns[f"{name}_{split}"] = nodes.statistics[name, split][order]
    return columns


def _agreement(nodes: SiteNodes, overlap_at: Sequence[int], draws: np.ndarray, ranking: str) -> Columns:
    train, test = (strength(nodes.score(split), ranking) for split in ("train", "test"))
    drawn = strength(draws, ranking)
    spearman = float(rank_correlation(train, test[None])[0])
    low, high = interval(rank_correlation(train, drawn), spearman, (-1, 1))
    rows = [_overlap_at(k, train, test, drawn) for k in sorted({min(k, len(train)) for k in overlap_at})]
    size = len(rows)
    return {
        "site": np.full(size, nodes.site, object),
        **{name: np.array([row[name] for row in rows]) for name in ("k", "overlap", "low", "high")},
        "spearman": np.full(size, spearman),
        "spearman_low": np.full(size, low),
        "spearman_high": np.full(size, high),
        "nodes": np.full(size, len(train), np.int64),
    }


def _overlap_at(k: int, train: np.ndarray, test: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    top = falling(train)[:k]
    share = float(overlap(top, falling(test)))
    unknown = bool(np.isnan(drawn).any())
    low, high = (np.nan, np.nan) if unknown else interval(overlap(top, falling(drawn)), share, (0, 1))
    return {"k": k, "overlap": share, "low": low, "high": high}


def _importance(nodes: SiteNodes, split: str, draws: np.ndarray) -> Columns:
    columns: Columns = {
        "site": np.array([nodes.site], object),
        "split": np.array([split], object),
        "n": np.array([nodes.n[split]], np.int64),
    }
    for quantity in QUANTITIES:
        members = nodes.kind == ("error" if quantity.startswith("error") else "feature")
        size = np.abs if quantity.endswith("abs") else np.asarray
        total = float(size(nodes.score(split)[members]).sum())
        low, high = interval(size(draws[:, members]).sum(1), total)
        columns[quantity] = np.array([total])
        columns[f"{quantity}_low"], columns[f"{quantity}_high"] = np.array([low]), np.array([high])
    return columns

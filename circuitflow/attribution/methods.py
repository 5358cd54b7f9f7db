"""How well node methods agree with a reference method (exact patching, if it is among them), site by site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.intervals import correlation, falling, interval, overlap, ranks
from circuitflow.attribution.nodes import kinds, strength
from circuitflow.errors import UserError, nearest
from circuitflow.jobs import Output, progress
from circuitflow.store.tables import read_table, write_table

UNSIGNED = ("decoder_only",)
"""Methods whose scores have no sign: they are compared with |reference|."""

CONVENTIONS = {
    "nodes": "those that the reference has measured; a node that the other method does not list scores 0 there",
    "pearson": "of the scores themselves; with |reference| for decoder_only, which has no error nodes either",
    "slope": "of the reference on the method, least squares through the origin: 1 if effects have the right size",
    "spearman": "of node strengths (|score|, or the score itself if the ranking is signed)",
    "overlap": "share of the reference's k strongest nodes among the method's k strongest",
    "intervals": "95 %, pairs resampled for both methods together; NaN for a method without scores per pair",
}

Columns = dict[str, np.ndarray]
Node = tuple[int, int]


def compare_methods(inputs: Mapping[str, Sequence[Path]], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Agreement of node methods with a reference.

    Inputs ``scores_{method}`` and ``pairs_{method}`` (lists of tables of score_nodes, patch_nodes or score_in_loop, in
    the order of ``sites``); params ``sites``, ``methods``, ``overlap_at`` (list of k), ``seed``, optionally
    ``reference`` ("exact" by default, or the first method if that is not among them), ``ranking`` (absolute | signed),
    ``split`` (train by default), ``bootstrap`` (resamples, 1000 by default). Outputs:

    - ``agreement``: site, method, reference, n (nodes), pearson, slope, spearman with ``_low`` and ``_high``, and one
      row for each k, overlap, overlap_low, overlap_high. What they are is in the provenance (``conventions``).
    - ``nodes``: site, method, kind, feature, position, score, reference: the joined scores, for a scatter figure.

    :raises UserError: the reference is not among the methods.
    """
    methods = list(params["methods"])
    reference = params.get("reference") or ("exact" if "exact" in methods else methods[0])
    if reference not in methods:
        raise UserError(
            f"The reference '{reference}' is not among the methods: {nearest(reference, methods)}."
        )
    agreement: list[Columns] = []
    nodes: list[Columns] = []
    for number, site in enumerate(params["sites"]):
        known = read_scores(inputs, reference, number, params)
        for method in methods:
            if method == reference:
                continue
            both = _joined(method, read_scores(inputs, method, number, params), known)
            agreement.append(_agreement(site, both, reference, params))
            nodes.append(_node_rows(site, both))
        progress("sites compared", number + 1, len(params["sites"]))
    for name, parts in (("agreement", agreement), ("nodes", nodes)):
        columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}
        facts = {"conventions": CONVENTIONS, "reference": reference}
        write_table(out.files[name], columns, {**out.provenance, **facts})


@dataclass(frozen=True)
class Scores:
    """Scores of one method at one site in one split."""

    mean: dict[Node, float]
    pairs: Columns
    n: int


@dataclass(frozen=True)
class Joined:
    """Scores of a method and of the reference for the same nodes."""

    method: str
    nodes: list[Node]
    score: np.ndarray
    """(n,)."""
    reference: np.ndarray
    """(n,)."""
    effects: tuple[np.ndarray, np.ndarray] | None
    """Per pair, (pairs, n) each; None if the method gives none."""


def read_scores(
    inputs: Mapping[str, Sequence[Path]], method: str, number: int, params: Mapping[str, Any]
) -> Scores:
    """Scores of one method at the site of that number, from the inputs ``scores_{method}`` and ``pairs_{method}``."""
    split = params.get("split", "train")
    table, pairs = (read_table(Path(inputs[f"{name}_{method}"][number])) for name in ("scores", "pairs"))
    here, within = table["split"] == split, pairs["split"] == split
    keys = zip(table["feature"][here].tolist(), table["position"][here].tolist(), strict=True)
    return Scores(
        mean=dict(zip(keys, table["score"][here].tolist(), strict=True)),
        pairs={name: column[within] for name, column in pairs.items()},
        n=int(table["n"][here].max(initial=0)),
    )


def _joined(method: str, scores: Scores, known: Scores) -> Joined:
    nodes = sorted(node for node in known.mean if method not in UNSIGNED or node[0] >= 0)
    size = np.abs if method in UNSIGNED else np.asarray
    place = {node: index for index, node in enumerate(nodes)}
    effects = None
    if len(scores.pairs["pair"]) and len(known.pairs["pair"]):
        row = {pair: index for index, pair in enumerate(np.unique(known.pairs["pair"]).tolist())}
        effects = (per_pair(scores, place, row, known.n), per_pair(known, place, row, known.n))
    return Joined(
        method=method,
        nodes=nodes,
        score=np.array([scores.mean.get(node, 0.0) for node in nodes]),
        reference=size(np.array([known.mean[node] for node in nodes])),
        effects=effects,
    )


def per_pair(scores: Scores, place: Mapping[Node, int], row: Mapping[int, int], n: int) -> np.ndarray:
    """Effects (pairs, nodes) of the nodes in ``place`` (their columns) in the pairs in ``row`` (their rows), else 0."""
    dense = np.zeros((max(n, len(row)), len(place)))
    columns = (scores.pairs[name].tolist() for name in ("pair", "feature", "position", "score"))
    for pair, feature, position, score in zip(*columns, strict=True):
        if pair in row and (feature, position) in place:
            dense[row[pair], place[feature, position]] = score
    return dense


def _agreement(site: str, both: Joined, reference: str, params: Mapping[str, Any]) -> Columns:
    ranking = "absolute" if both.method in UNSIGNED else params.get("ranking", "absolute")
    ks = sorted({min(k, len(both.nodes)) for k in params["overlap_at"]})
    values = _measures(both.score, both.reference, ranking, ks)
    drawn = _drawn(both, ranking, ks, params)
    columns: Columns = {
        "site": np.full(len(ks), site, object),
        "method": np.full(len(ks), both.method, object),
        "reference": np.full(len(ks), reference, object),
        "n": np.full(len(ks), len(both.nodes), np.int64),
    }
    for name, bounds in (("pearson", (-1, 1)), ("slope", (-np.inf, np.inf)), ("spearman", (-1, 1))):
        low, high = interval(drawn[name], values[name], bounds)
        columns |= {name: np.full(len(ks), values[name])}
        columns |= {f"{name}_low": np.full(len(ks), low), f"{name}_high": np.full(len(ks), high)}
    spread = np.array([interval(drawn[f"overlap {k}"], values[f"overlap {k}"], (0, 1)) for k in ks])
    columns |= {
        "k": np.array(ks, np.int64),
        "overlap": np.array([values[f"overlap {k}"] for k in ks]),
        "overlap_low": spread[:, 0],
        "overlap_high": spread[:, 1],
    }
    return columns


def _measures(score: np.ndarray, reference: np.ndarray, ranking: str, ks: Sequence[int]) -> dict[str, float]:
    ours, theirs = strength(score, ranking), strength(reference, ranking)
    size, order, top = float(score @ score), falling(ours), falling(theirs)
    return {
        "pearson": correlation(score, reference),
        "slope": float(score @ reference) / size if size > 0 else float("nan"),
        "spearman": correlation(ranks(ours), ranks(theirs)),
        **{f"overlap {k}": float(overlap(top[:k], order)) for k in ks},
    }


def _drawn(both: Joined, ranking: str, ks: Sequence[int], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every measure on resampled pairs; a single NaN if there is nothing to resample."""
    if both.effects is None:
        return dict.fromkeys(_measures(both.score, both.reference, ranking, ks), np.array([np.nan]))
    score, reference = both.effects
    n = len(score)
    generator = np.random.default_rng(params["seed"])
    counts = generator.multinomial(n, np.full(n, 1 / n), size=params.get("bootstrap", 1000))
    draws = [_measures(row @ score / n, row @ reference / n, ranking, ks) for row in counts]
    return {name: np.array([draw[name] for draw in draws]) for name in draws[0]}


def _node_rows(site: str, both: Joined) -> Columns:
    feature, position = np.array(both.nodes, np.int64).reshape(-1, 2).T
    return {
        "site": np.full(len(feature), site, object),
        "method": np.full(len(feature), both.method, object),
        "kind": kinds(feature),
        "feature": feature,
        "position": position,
        "score": both.score,
        "reference": both.reference,
    }

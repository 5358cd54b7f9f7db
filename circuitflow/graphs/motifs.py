"""Stage ``find_motifs``: chains of features that recur across the graphs of many prompts, against shuffled graphs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.intervals import INTERVAL
from circuitflow.errors import UserError
from circuitflow.graphs.chains import Edges, Shuffled, chains, codes_of, possible_chains
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.influence import prune
from circuitflow.jobs import Output, progress
from circuitflow.store.tables import write_table

CONVENTIONS = {
    "chain": "features by layer and number, at whatever positions, joined by the strongest edges of the pruned graph; "
    "of length 3 through one and the same node",
    "shuffled": "edges between features swap their targets, so that every node keeps how many come in and go out; "
    "effects still run to a later layer and to the same or a later position",
    "p": "probability of at least so many graphs where every graph is shuffled by itself (Poisson binomial; the "
    "probability of each graph is (1 + shuffles with the chain) / (1 + shuffles))",
    "q": "p corrected for all chains that the graphs' features could form in enough graphs (Benjamini-Hochberg)",
}


def find_motifs(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Which chains of features recur, and whether more often than in shuffled graphs.

    Input ``graphs`` (list, one per prompt); params ``names`` (of the prompts, in that order), ``node_share`` and
    ``edge_share`` (of pruning), ``edges`` (of each graph, the strongest), ``least`` (graphs that a chain must be in),
    ``lengths`` (2, 3), ``shuffles``, ``swaps`` (tried per edge between two shuffled graphs), ``level`` (false
    discovery rate), ``seed``.

    Outputs:

    - ``motifs``: length, chain ("3_1021 > 7_88"), first, second, third (features; "" where there is none), graphs,
      of (graphs in all), prompts, expected (graphs, shuffled), p, q, recurring (q ≤ level), weight_1, weight_2 (mean
      effect of each edge), positive (share of its graphs in which the product of its effects is positive);
    - ``totals``: length, graphs, observed (chains in at least so many graphs), expected, low, high (95 % of shuffled
      sets of graphs), p (share of shuffled sets with as many, with 1 added above and below).

    :raises UserError: there are fewer graphs than a chain must be in.
    """
    names, least = list(params["names"]), int(params["least"])
    if len(names) < least:
        raise UserError(
            f"Motifs need at least {least} graphs (graphs.motifs.least), but graphs.prompts has {len(names)}; add "
            "prompts or lower that key."
        )
    edges = [
        read_edges(Graph.load(Path(path)), params["node_share"], params["edge_share"], params["edges"])
        for path in inputs["graphs"]
    ]
    motifs, totals = recurring(edges, names, params)
    facts = {**out.provenance, "conventions": CONVENTIONS, "level": params["level"]}
    write_table(out.files["motifs"], motifs, facts)
    write_table(out.files["totals"], totals, facts)


def read_edges(graph: Graph, node_share: float, edge_share: float, most: int) -> Edges:
    """The pruned graph's edges between features, those with most influence along them."""
    kept = prune(graph, node_share, edge_share)
    between = np.flatnonzero((kept.edges < graph.first_error).all(axis=1))
    strongest = between[np.argsort(-kept.shares[between], kind="stable")[:most]]
    between = np.sort(strongest)
    return Edges(
        source=kept.edges[between, 1],
        target=kept.edges[between, 0],
        weight=np.asarray(kept.weights[between], dtype=np.float64),
        features=graph.features,
    )


def recurring(
    edges: Sequence[Edges], names: Sequence[str], params: Mapping[str, Any]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """The tables ``motifs`` and ``totals`` of some graphs' edges."""
    keys, graphs = np.unique(np.concatenate([one.keys() for one in edges]), axis=0, return_counts=True)
    keys = keys[graphs >= params["least"]]  # others are in no chain that counts
    motifs: dict[str, list[Any]] = {name: [] for name in MOTIFS}
    totals: dict[str, list[Any]] = {name: [] for name in TOTALS}
    for length in params["lengths"]:
        observed = [
            codes_of(chains(one.source, one.target, length), one.number(keys), len(keys)) for one in edges
        ]
        codes, counts = np.unique(np.concatenate(observed), return_counts=True)
        codes, counts = codes[counts >= params["least"]], counts[counts >= params["least"]]
        hits, shuffled = _shuffled_counts(edges, keys, length, codes, params)
        _add_totals(totals, length, observed, shuffled, params["least"])
        held = possible_chains(edges, keys, length, codes)
        chance = np.where(held.possible, (1 + hits) / (1 + params["shuffles"]), 0.0)
        p = np.array([tail(chance[:, i], int(counts[i])) for i in range(len(codes))])
        q = corrected(p, held.total(params["least"]))
        order = np.lexsort((codes, -counts, p))
        for i in order:
            where = [g for g, found in enumerate(observed) if np.isin(codes[i], found)]
            facts: dict[str, Any] = {
                "p": float(p[i]),
                "q": float(q[i]),
                "recurring": bool(q[i] <= params["level"]),
            }
            facts |= {"expected": float(hits[:, i].sum() / params["shuffles"])}
            facts |= {
                "graphs": int(counts[i]),
                "of": len(edges),
                "prompts": " ".join(names[g] for g in where),
            }
            _add_motif(motifs, keys, int(codes[i]), length, [edges[g] for g in where], facts)
    return motifs, totals


MOTIFS = (
    "length", "chain", "first", "second", "third", "graphs", "of", "prompts", "expected", "p", "q", "recurring",
    "weight_1", "weight_2", "positive",
)  # fmt: skip
TOTALS = ("length", "graphs", "observed", "expected", "low", "high", "p")


def _shuffled_counts(
    edges: Sequence[Edges], keys: np.ndarray, length: int, codes: np.ndarray, params: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(graphs, chains) shuffles with the chain, and (shuffles, graphs) chains in at least 1, 2, … shuffled graphs."""
    states = [Shuffled(one, params["seed"] + number) for number, one in enumerate(edges)]
    numbers = [one.number(keys) for one in edges]
    hits = np.zeros((len(edges), len(codes)), dtype=np.int64)
    at_least = np.zeros((params["shuffles"], len(edges)), dtype=np.int64)
    for shuffle in range(params["shuffles"]):
        found = []
        for g, (state, number) in enumerate(zip(states, numbers, strict=True)):
            source, target = state.next(params["swaps"])
            found.append(codes_of(chains(source, target, length), number, len(keys)))
            hits[g] += np.isin(codes, found[g], assume_unique=True)
        at_least[shuffle] = in_at_least(found)
        progress(f"shuffled graphs, chains of {length}", shuffle + 1, params["shuffles"])
    return hits, at_least


def in_at_least(found: Sequence[np.ndarray]) -> np.ndarray:
    """(graphs,) how many chains are in at least 1, 2, … of the graphs."""
    _, counts = np.unique(np.concatenate(found), return_counts=True)
    return np.bincount(counts, minlength=len(found) + 1)[::-1].cumsum()[::-1][1:]


def _add_totals(
    totals: dict[str, list[Any]],
    length: int,
    observed: Sequence[np.ndarray],
    shuffled: np.ndarray,
    least: int,
) -> None:
    seen = in_at_least(observed)
    for count in range(least, len(observed) + 1):
        drawn = shuffled[:, count - 1]
        low, high = np.percentile(drawn, INTERVAL)
        p = (1 + int((drawn >= seen[count - 1]).sum())) / (1 + len(drawn))
        row = (length, count, int(seen[count - 1]), float(drawn.mean()), float(low), float(high), p)
        for name, value in zip(TOTALS, row, strict=True):
            totals[name].append(value)


def _add_motif(
    motifs: dict[str, list[Any]],
    keys: np.ndarray,
    code: int,
    length: int,
    where: Sequence[Edges],
    facts: Mapping[str, Any],
) -> None:
    places = []
    for _ in range(length):
        code, place = divmod(code, len(keys))
        places.append(place)
    features = [f"{layer}_{feature}" for layer, feature in keys[places[::-1]].tolist()]
    means = np.array([one.mean_weights([tuple(keys[place]) for place in places[::-1]]) for one in where])
    row: dict[str, Any] = dict(facts) | {"length": length, "chain": " > ".join(features)}
    row |= dict(zip(("first", "second", "third"), [*features, ""], strict=False))
    row |= {"weight_1": float(means[:, 0].mean())}
    row |= {"weight_2": float(means[:, 1].mean()) if length == 3 else float("nan")}
    row |= {"positive": float((means.prod(axis=1) > 0).mean())}
    for name in MOTIFS:
        motifs[name].append(row[name])


def tail(chances: np.ndarray, count: int) -> float:
    """P(at least ``count`` of independent events with these probabilities happen): the Poisson binomial's tail."""
    spread = np.zeros(len(chances) + 1)
    spread[0] = 1.0
    for chance in chances:
        spread[1:] = spread[1:] * (1 - chance) + spread[:-1] * chance
        spread[0] *= 1 - chance
    return float(spread[count:].sum())


def corrected(p: np.ndarray, tests: int) -> np.ndarray:
    """False discovery rates (Benjamini and Hochberg 1995) of the smallest of ``tests`` p-values."""
    order = np.argsort(p, kind="stable")
    rates = p[order] * tests / np.arange(1, len(p) + 1)
    out = np.empty_like(rates)
    out[order] = np.minimum.accumulate(rates[::-1])[::-1].clip(max=1.0)
    return out

"""How surely the nodes and edges of a circuit would be chosen again, had other pairs been drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.intervals import INTERVAL
from circuitflow.attribution.nodes import ERROR, SUMMED, kinds, strength
from circuitflow.circuits.circuit import Circuit, Node, read_circuit
from circuitflow.circuits.selection import chosen
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.store.tables import read_provenance, read_table, write_table

Columns = dict[str, np.ndarray]

CONVENTIONS = {
    "nodes": "each draw resamples the training pairs (the same at every site), averages, and applies pool and rule",
    "edges": "each draw of the edge tables re-applies the rule to the edges between the circuit's nodes",
    "fixed": "pruning and the node cap are not re-applied; edges into the metric are subject to no rule",
}


@dataclass(frozen=True)
class Effects:
    """Effects of nodes in single pairs, where they are not 0."""

    nodes: Columns
    """site, feature, position: one row per node, by site in order of depth, feature number and position."""
    node: np.ndarray
    """(entries,) row of the node."""
    pair: np.ndarray
    """(entries,) number of the pair, from 0."""
    effect: np.ndarray
    """(entries,)"""
    pairs: int

    def mean(self, counts: np.ndarray | None = None) -> np.ndarray:
        """Mean effect (nodes,) over the pairs, or over a resample that holds pair i ``counts[i]`` times."""
        effect = self.effect if counts is None else self.effect * counts[self.pair]
        return np.bincount(self.node, effect, len(self.nodes["feature"])) / self.pairs


def circuit_stability(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. How often resampled pairs choose each node and edge again.

    Inputs ``circuit``, ``pairs`` (list of per-pair tables of score_nodes, in the order of ``sites``), ``edges`` and
    ``draws`` (lists of tables of score_edges and of their bootstrap draws, row for row); params ``sites``, ``nodes``
    and ``edges`` (rules of :func:`circuitflow.circuits.selection.chosen`), ``ranking`` (absolute | signed), ``pool``,
    ``resamples``, ``seed``. A rule ``faithfulness``, which needs the model, becomes ``top`` with the number of
    nodes before pruning. For ``sparsity``, all nodes are counted in the circuit's ``selection["total_nodes"]``.

    Outputs, one row for everything that is in the circuit or that any draw chooses:

    - ``nodes``: site, kind, feature, position (−1: summed), score (mean over the training pairs), in_circuit, passes
      (chosen on all pairs, before any pruning), selected (share of draws that choose it), sign_stability (share of
      draws in which its score has the sign that it has on all pairs), low, high (95 % of the draws), pairs, resamples;
    - ``edges``: up, down (ids of nodes, or "metric"), weight, and in_circuit, passes, selected, sign_stability, low,
      high, resamples likewise. Candidates are the edges between nodes of the circuit.

    :raises UserError: scores without effects per pair (decoder only), or draws that do not fit their edge table.
    """
    circuit, seed, resamples = read_circuit(Path(inputs["circuit"])), params["seed"], params["resamples"]
    effects = read_effects(params["sites"], [Path(path) for path in inputs["pairs"]])
    rule = without_model(params["nodes"], circuit)
    total = circuit.selection.get("total_nodes")
    nodes = node_stability(effects, rule, params["ranking"], params["pool"], resamples, seed, total)
    files = zip(inputs["edges"], inputs["draws"], strict=True)
    tables = [candidate_edges(Path(edges), Path(draws), circuit.nodes) for edges, draws in files]
    edges = edge_stability(tables, params["edges"], params["ranking"])
    inside = {(node.site, node.feature, _position(node)) for node in circuit.nodes}
    named = zip(nodes["site"], nodes["feature"].tolist(), nodes["position"].tolist(), strict=True)
    nodes["in_circuit"] = np.array([name in inside for name in named], bool)
    ends = {(edge.up, edge.down) for edge in circuit.edges}
    edges["in_circuit"] = np.array(
        [end in ends for end in zip(edges["up"], edges["down"], strict=True)], bool
    )
    facts = {**out.provenance, "conventions": CONVENTIONS}
    for name, columns in (("nodes", nodes), ("edges", edges)):
        shown = columns["in_circuit"] | columns["passes"] | (columns["selected"] > 0)
        write_table(out.files[name], {key: values[shown] for key, values in columns.items()}, facts)


def without_model(rule: Mapping[str, Any], circuit: Circuit) -> Mapping[str, Any]:
    """A rule that needs no model: a wanted faithfulness becomes the number of nodes that reached it, before pruning."""
    if "faithfulness" not in rule:
        return rule
    gone = (circuit.selection.get(name, ()) for name in ("pruned", "over_cap"))
    return {"top": len(circuit.nodes) + sum(map(len, gone))}


def read_effects(sites: Sequence[str], paths: Sequence[Path]) -> Effects:
    """The training pairs' effects at all sites; a pair in which no node of any site changes is not known of.

    :raises UserError: a table has no effects on the training pairs.
    """
    tables = [
        _train(read_table(path), number, site, path)
        for number, (site, path) in enumerate(zip(sites, paths, strict=True))
    ]
    joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    features, positions = (int(joined[name].max()) + 2 for name in ("feature", "position"))
    keys = (joined["site"] * features + joined["feature"] + 1) * positions + joined["position"] + 1
    nodes, node = np.unique(keys, return_inverse=True)
    names, pair = np.unique(joined["pair"], return_inverse=True)
    columns = {
        "site": np.array(list(sites), object)[nodes // positions // features],
        "feature": nodes // positions % features - 1,
        "position": nodes % positions - 1,
    }
    return Effects(columns, node, pair, joined["score"].astype(np.float64), len(names))


def node_stability(
    effects: Effects,
    rule: Mapping[str, Any],
    ranking: str,
    pool: int,
    resamples: int,
    seed: int,
    total: int | None = None,
) -> Columns:
    """Every node's score, whether it passes, how often it is selected, its sign and interval over resampled pairs."""
    order = _positions_of(effects.nodes)
    score = effects.mean()
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(
        effects.pairs, np.full(effects.pairs, 1 / effects.pairs), size=resamples
    ).astype(np.float64)
    draws, hits = np.empty((resamples, len(score)), np.float32), np.zeros(len(score))
    for number, count in enumerate(counts):
        drawn = effects.mean(count)
        draws[number] = drawn
        hits += _passing(drawn, effects.nodes, order, rule, ranking, pool, total)
        progress("resamples", number + 1, resamples)
    return {
        "site": effects.nodes["site"],
        "kind": kinds(effects.nodes["feature"]),
        "feature": effects.nodes["feature"],
        "position": effects.nodes["position"],
        "score": score,
        "passes": _passing(score, effects.nodes, order, rule, ranking, pool, total),
        "selected": hits / resamples,
        **_spread(score, draws),
        "pairs": np.full(len(score), effects.pairs, np.int64),
        "resamples": np.full(len(score), resamples, np.int64),
    }


def candidate_edges(edges: Path, draws: Path, nodes: Sequence[Node]) -> tuple[Columns, np.ndarray]:
    """Edges of one table between nodes of the circuit (up, down, weight) and their draws (draws, edges).

    Edges into the metric are left out: no rule chooses them.

    :raises UserError: the draws have other rows than the edges.
    """
    table, down = read_table(edges), read_provenance(edges)["params"]["down"]
    drawn = read_table(draws)
    names = sorted((name for name in drawn if name[1:].isdecimal()), key=lambda name: int(name[1:]))
    if not names or len(drawn[names[0]]) != len(table["weight"]):
        raise UserError(
            f"Draws {draws} do not fit the edges {edges}; run score_edges again with edges.draws above 0."
        )
    ids = {(node.site, node.feature, _position(node)): node.id for node in nodes}
    up_ends = zip(table["up_site"], table["up_feature"].tolist(), table["up_position"].tolist(), strict=True)
    down_ends = zip(table["down_feature"].tolist(), table["down_position"].tolist(), strict=True)
    up = np.array([ids.get(end) for end in up_ends], object)
    into = np.array([ids.get((down, *end)) for end in down_ends], object)
    both = np.array([a is not None and b is not None for a, b in zip(up, into, strict=True)], bool)
    columns = {"up": up[both], "down": into[both], "weight": table["weight"][both].astype(np.float64)}
    return columns, np.stack([drawn[name][both] for name in names]).astype(np.float64)


def edge_stability(
    tables: Sequence[tuple[Columns, np.ndarray]], rule: Mapping[str, Any], ranking: str
) -> Columns:
    """What :func:`node_stability` tells of nodes, of candidate edges; their draws must be equally many.

    The nodes stay those of the circuit. Weights of exactly 0 are no candidates; of ``sparsity`` the whole is all
    candidates.
    """
    if not tables:
        return _no_edges()
    joined = {name: np.concatenate([table[name] for table, _ in tables]) for name in tables[0][0]}
    resamples = min(len(draws) for _, draws in tables)
    draws = np.concatenate([draw[:resamples] for _, draw in tables], 1)
    whole = int((joined["weight"] != 0).sum())

    def passing(weights: np.ndarray) -> np.ndarray:
        found = np.zeros(len(weights), bool)
        rows = np.flatnonzero(weights)
        found[rows[chosen(strength(weights[rows], ranking), rule, max(whole, len(rows)))]] = True
        return found

    return {
        **joined,
        "passes": passing(joined["weight"]),
        "selected": np.mean([passing(draw) for draw in draws], 0),
        **_spread(joined["weight"], draws),
        "resamples": np.full(len(joined["weight"]), resamples, np.int64),
    }


def _train(table: Columns, number: int, site: str, path: Path) -> Columns:
    here = table["split"] == "train"
    if not here.any():
        raise UserError(
            f"Table {path} has no effects of single training pairs at {site}, which stability resamples; "
            "score with a method that gives them (all but decoder_only)."
        )
    columns = {name: table[name][here] for name in ("feature", "position", "pair", "score")}
    return {"site": np.full(int(here.sum()), number, np.int64), **columns}


def _positions_of(nodes: Columns) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows of the features and of the errors of every site."""
    sites = list(dict.fromkeys(nodes["site"].tolist()))
    is_error = nodes["feature"] == ERROR
    return {
        site: (
            np.flatnonzero((nodes["site"] == site) & ~is_error),
            np.flatnonzero((nodes["site"] == site) & is_error),
        )
        for site in sites
    }


def _passing(
    scores: np.ndarray,
    nodes: Columns,
    order: Mapping[str, tuple[np.ndarray, np.ndarray]],
    rule: Mapping[str, Any],
    ranking: str,
    pool: int,
    total: int | None,
) -> np.ndarray:
    """Which nodes the rule chooses, given scores, among the pools: per site the strongest features, and the errors."""
    strengths = strength(scores, ranking)
    pools = []
    for features, errors in order.values():
        strongest = features[np.argsort(-strengths[features], kind="stable")]
        pools += [strongest[scores[strongest] != 0][:pool], errors[scores[errors] != 0]]
    rows = np.concatenate(pools)
    found = np.zeros(len(scores), bool)
    found[rows[chosen(strengths[rows], rule, total)]] = True
    return found


def _spread(value: np.ndarray, draws: np.ndarray) -> Columns:
    """Share of draws with the value's sign, and the interval; NaN without draws."""
    if not len(draws):
        return {name: np.full(len(value), np.nan) for name in ("sign_stability", "low", "high")}
    low, high = np.percentile(draws, INTERVAL, axis=0)
    return {
        "sign_stability": (np.sign(draws) == np.sign(value)).mean(0),
        "low": low.astype(np.float64),
        "high": high.astype(np.float64),
    }


def _no_edges() -> Columns:
    numbers = ("weight", "selected", "sign_stability", "low", "high")
    return {
        "up": np.zeros(0, object),
        "down": np.zeros(0, object),
        **{name: np.zeros(0) for name in numbers},
        "passes": np.zeros(0, bool),
        "resamples": np.zeros(0, np.int64),
    }


def _position(node: Node) -> int:
    return SUMMED if node.position is None else node.position

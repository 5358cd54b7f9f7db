"""Choosing the nodes and edges of a circuit from ranked nodes and scored edges; no number is computed here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.attribution.nodes import ERROR, SUMMED, strength
from circuitflow.circuits.circuit import (
    METRIC,
    Circuit,
    Edge,
    Kind,
    Node,
    without_path_to_metric,
    write_circuit,
    write_dot,
    write_graphml,
)
from circuitflow.circuits.members import edges_between
from circuitflow.circuits.pruning import Pruned, pruned
from circuitflow.circuits.selection import chosen
from circuitflow.dictionaries.dictionary import load_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.progress import logger
from circuitflow.store.objects import content_of
from circuitflow.store.tables import read_table

CONVENTIONS = {
    "metric": "m = wrong - right: negative when the model is right",
    "score": "IE of a node on m, mean over training pairs; > 0: its clean value supports the clean answer",
    "position": "null: summed over positions",
    "weight": "effect that the upstream node has on m through the downstream node and no other site of the run, in the "
    "same units",
    "metric_edges": "effect that reaches m past every other site of the run",
    "conservation": "largest |sum over a node's outgoing edges, all downstream nodes, rests and the metric included, "
    "- its effect|, and the same as a share of the largest effect in the pools",
}

Table = Mapping[str, np.ndarray]


def assemble_circuit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. The circuit as JSON, GraphML and Graphviz.

    Inputs ``nodes`` (table of rank_features), ``edges`` (list of tables of score_edges), for a rule faithfulness
    ``search`` (table of search_circuit), and ``dictionaries`` (all sites'); params ``sites`` (in order
    of depth), ``nodes`` and ``edges`` (rules of :func:`circuitflow.circuits.selection.chosen`), ``pool``, ``ranking``,
    ``prune``, ``max_nodes``, ``model`` and ``task``. Candidates are the pool: per site the ``pool`` strongest features
    and the errors. Edges run between chosen nodes; those to the metric are all kept.

    :raises UserError: no node passes.
    """
    sites, table, ranking = list(params["sites"]), read_table(inputs["nodes"]), params["ranking"]
    dictionaries = [Path(path) for path in inputs["dictionaries"]]
    total = _total_nodes(dictionaries, table) if "sparsity" in params["nodes"] else None
    rule = _without_search(params["nodes"], inputs.get("search", []))
    candidates = candidate_nodes(table, sites, params["pool"], ranking)
    nodes = _passing(candidates, rule, ranking, total)
    if not nodes:
        strongest = max((_strength(node.score, ranking) for node in candidates), default=0.0)
        raise UserError(
            f"No node passes circuit.nodes {params['nodes']}: the strongest has {strongest:.3g}; lower the threshold."
        )
    tables = [Path(path) for path in inputs["edges"]]
    possible = [edge for path in tables for edge in edges_between(path, nodes)]
    inner = [edge for edge in possible if edge.down != METRIC]
    ends = [edge for edge in possible if edge.down == METRIC]
    wanted = chosen([_strength(edge.weight, ranking) for edge in inner], params["edges"], len(inner))
    kept = [inner[i] for i in wanted]
    left = pruned(nodes, kept + ends, params["prune"], sites, params["max_nodes"], ranking)
    if not left.nodes:
        raise UserError(
            f"Key circuit.prune is {params['prune']}, after which none of {len(nodes)} nodes is left: no edge among "
            "those kept leads to the metric; raise circuit.edges or set circuit.prune to none."
        )
    selection = {
        "nodes": params["nodes"],
        "edges": params["edges"],
        "ranking": ranking,
        "prune": params["prune"],
        "max_nodes": params["max_nodes"],
        "candidates": len(candidates),
        "total_nodes": total,
        "passing_outside_pool": outside_pool(table, candidates, sites, rule, ranking, total),
        "possible_edges": len(inner),
        "smallest_score": min((abs(node.score) for node in left.nodes), default=None),
        "smallest_weight": min(
            (abs(edge.weight) for edge in left.edges if edge.down != METRIC), default=None
        ),
        "pruned": left.off_path,
        "over_cap": left.over_cap,
        "without_path_to_metric": without_path_to_metric(left.nodes, left.edges),
        "conservation": conservation(tables),
    }
    made = dict(zip(sites, (content_of(path) for path in dictionaries), strict=True))
    provenance = {
        **out.provenance,
        "model": params["model"],
        "task": params["task"],
        "dictionaries": made,
    }
    circuit = in_order(sites, left.nodes, left.edges, selection, provenance)
    write_circuit(out.files["circuit"], circuit)
    write_graphml(out.files["graphml"], circuit)
    write_dot(out.files["dot"], circuit)
    _tell(circuit, left)


def conservation(tables: Sequence[Path]) -> dict[str, dict[str, float]]:
    """By upstream site, how far the weights of a node's outgoing edges are from its whole effect, at worst.

    ``residual`` is in units of the metric, ``relative`` a share of the largest |effect| among the site's nodes.
    """
    sums: dict[tuple[str, int, int], float] = {}
    effects: dict[tuple[str, int, int], float] = {}
    for path in tables:
        table = read_table(path)
        names = ("up_site", "up_feature", "up_position", "weight", "up_effect")
        for site, feature, position, weight, effect in zip(*(table[n].tolist() for n in names), strict=True):
            node = (site, feature, position)
            sums[node] = sums.get(node, 0.0) + weight
            effects[node] = effect
    found: dict[str, dict[str, float]] = {}
    for site in sorted({node[0] for node in sums}):
        here = [node for node in sums if node[0] == site]
        residual = max(abs(sums[node] - effects[node]) for node in here)
        size = max(abs(effects[node]) for node in here)
        found[site] = {"residual": residual, "relative": residual / size if size else residual}
    return found


def in_order(
    sites: Sequence[str],
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    selection: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Circuit:
    """The circuit with nodes by site and falling |score|, edges by falling |weight|; ties by name."""
    depth = {site: index for index, site in enumerate(sites)}
    return Circuit(
        tuple(sites),
        tuple(sorted(nodes, key=lambda node: (depth[node.site], -abs(node.score), node.feature))),
        tuple(sorted(edges, key=lambda edge: (-abs(edge.weight), edge.up, edge.down))),
        selection,
        CONVENTIONS,
        provenance,
    )


def _tell(circuit: Circuit, left: Pruned) -> None:
    lost, left_out = (circuit.selection[name] for name in ("without_path_to_metric", "passing_outside_pool"))
    logger.info(
        "%d nodes (%d without a path to the metric), %d edges; %d nodes pruned, %d over the cap",
        len(circuit.nodes),
        len(lost),
        len(circuit.edges),
        len(left.off_path),
        len(left.over_cap),
    )
    if left_out:
        logger.warning(
            "%d more nodes pass but are outside the pool; raise edges.pool to take them in", left_out
        )


def candidate_nodes(table: Table, sites: Sequence[str], pool: int, ranking: str = "absolute") -> list[Node]:
    """Per site the ``pool`` strongest feature nodes on train, and the errors; nodes that score 0 are none."""
    found = []
    for site in sites:
        here = np.flatnonzero((table["site"] == site) & (table["score_train"] != 0))
        features = here[table["feature"][here] != ERROR]
        keys = (
            table["position"][features],
            table["feature"][features],
            -strength(table["score_train"][features], ranking),
        )
        errors = here[table["feature"][here] == ERROR]
        for row in [*features[np.lexsort(keys)][:pool], *errors]:
            kind: Kind = "error" if table["feature"][row] == ERROR else "feature"
            place = int(table["position"][row])
            feature, score = int(table["feature"][row]), float(table["score_train"][row])
            found.append(Node(site, kind, feature, score, None if place == SUMMED else place))
    return found


def outside_pool(
    table: Table,
    candidates: Sequence[Node],
    sites: Sequence[str],
    rule: Mapping[str, Any],
    ranking: str = "absolute",
    total: int | None = None,
) -> int:
    """How many nodes the selection would take if nodes without edges (outside the pool) were candidates too."""
    everything = candidate_nodes(table, sites, len(table["site"]), ranking)
    wanted = _passing(everything, rule, ranking, total)
    return len({node.id for node in wanted} - {node.id for node in candidates})


def _strength(value: float, ranking: str) -> float:
    return float(strength(np.array([value]), ranking)[0])


def _passing(nodes: Sequence[Node], rule: Mapping[str, Any], ranking: str, total: int | None) -> list[Node]:
    return [nodes[i] for i in chosen([_strength(node.score, ranking) for node in nodes], rule, total)]


def _without_search(rule: Mapping[str, Any], search: Sequence[Path]) -> Mapping[str, Any]:
    """A wanted faithfulness becomes the number of nodes that the search has found."""
    if "faithfulness" not in rule:
        return rule
    table = read_table(Path(search[0]))
    return {"top": int(table["nodes"][table["chosen"]][0])}


def _total_nodes(dictionaries: Sequence[Path], table: Table) -> int:
    """All nodes of all sites, those included that never have an effect."""
    places = max(1, int(table["position"].max(initial=SUMMED)) + 1)
    return sum(load_dictionary(path).d_dict + 1 for path in dictionaries) * places

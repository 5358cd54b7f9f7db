"""Choosing the nodes and edges of a circuit from ranked nodes and scored edges; no number is computed here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from circuitflow.attribution.nodes import ERROR
from circuitflow.circuits.circuit import (
    METRIC,
    Circuit,
    Edge,
    Kind,
    Node,
    without_path_to_metric,
    write_circuit,
    write_graphml,
)
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.progress import logger
from circuitflow.store.tables import read_provenance, read_table

CONVENTIONS = {
    "metric": "m = wrong - right: negative when the model is right",
    "score": "IE of a node on m, summed over positions, mean over training pairs; > 0: its clean value supports "
    "the clean answer",
    "weight": "effect that the upstream node has on m through the downstream node, in the same units",
    "metric_edges": "a node of the last site has its whole score as its edge to the metric",
}

Table = Mapping[str, np.ndarray]
T = TypeVar("T")


def assemble_circuit(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. The circuit as JSON and GraphML.

    Inputs ``nodes`` (table of rank_features) and ``edges`` (list of tables of score_edges); params ``sites`` (in order
    of depth), ``nodes`` and ``edges`` (``{"top": n}`` or ``{"threshold": t}``, on absolute values), ``pool``, ``model``
    and ``task``. Candidates are the pool: per site the ``pool`` strongest features and the error. Edges run between
    chosen nodes of neighbouring sites; a node of the last site leads to the metric with its score as weight.

    :raises UserError: no node passes.
    """
    sites, table = list(params["sites"]), read_table(inputs["nodes"])
    candidates = candidate_nodes(table, sites, params["pool"])
    nodes = [candidates[i] for i in chosen([node.score for node in candidates], params["nodes"])]
    if not nodes:
        strongest = max((abs(node.score) for node in candidates), default=0.0)
        raise UserError(
            f"No node passes circuit.nodes {params['nodes']}: the largest |score| is {strongest:.3g}; "
            "lower the threshold."
        )
    possible = [edge for path in inputs["edges"] for edge in edges_between(Path(path), nodes)]
    kept = [possible[i] for i in chosen([edge.weight for edge in possible], params["edges"])]
    ends = [Edge(node.id, METRIC, node.score) for node in nodes if node.site == sites[-1]]
    selection = {
        "nodes": params["nodes"],
        "edges": params["edges"],
        "candidates": len(candidates),
        "passing_outside_pool": outside_pool(table, candidates, sites, params["nodes"]),
        "possible_edges": len(possible),
        "smallest_score": min((abs(node.score) for node in nodes), default=None),
        "smallest_weight": min((abs(edge.weight) for edge in kept), default=None),
        "without_path_to_metric": without_path_to_metric(nodes, kept + ends),
    }
    provenance = {**out.provenance, "model": params["model"], "task": params["task"]}
    circuit = in_order(sites, nodes, kept + ends, selection, provenance)
    write_circuit(out.files["circuit"], circuit)
    write_graphml(out.files["graphml"], circuit)
    _tell(circuit)


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


def _tell(circuit: Circuit) -> None:
    lost, left_out = (circuit.selection[name] for name in ("without_path_to_metric", "passing_outside_pool"))
    logger.info(
        "%d nodes (%d without a path to the metric), %d edges",
        len(circuit.nodes),
        len(lost),
        len(circuit.edges),
    )
    if left_out:
        logger.warning(
            "%d more nodes pass but are outside the pool; raise edges.pool to take them in", left_out
        )


def candidate_nodes(table: Table, sites: Sequence[str], pool: int) -> list[Node]:
    """Per site the ``pool`` features with the largest |score| on train, and the error; nodes that score 0 are none."""
    found = []
    for site in sites:
        here = np.flatnonzero((table["site"] == site) & (table["score_train"] != 0))
        features = here[table["feature"][here] != ERROR]
        order = np.lexsort((table["feature"][features], -np.abs(table["score_train"][features])))
        error = here[table["feature"][here] == ERROR]
        for row in [*features[order][:pool], *error]:
            kind: Kind = "error" if table["feature"][row] == ERROR else "feature"
            found.append(Node(site, kind, int(table["feature"][row]), float(table["score_train"][row])))
    return found


def outside_pool(
    table: Table, candidates: Sequence[Node], sites: Sequence[str], selection: Mapping[str, Any]
) -> int:
    """How many nodes the selection would take if nodes without edges (outside the pool) were candidates too."""
    everything = candidate_nodes(table, sites, len(table["site"]))
    wanted = chosen([node.score for node in everything], selection)
    return len({everything[i].id for i in wanted} - {node.id for node in candidates})


def edges_between(path: Path, nodes: Sequence[Node]) -> list[Edge]:
    """Edges of one table of score_edges whose ends are both among the nodes; weights of exactly 0 are no edges."""
    params = read_provenance(path)["params"]
    table = read_table(path)
    ends = {(node.site, node.kind, node.feature): node.id for node in nodes}
    found = []
    columns = ("up_kind", "up_feature", "down_kind", "down_feature", "weight")
    for up_kind, up, down_kind, down, weight in zip(*(table[name].tolist() for name in columns), strict=True):
        first = ends.get((params["up"], up_kind, up))
        second = ends.get((params["down"], down_kind, down))
        if first is not None and second is not None and weight != 0:
            found.append(Edge(first, second, float(weight)))
    return found


def chosen(values: Sequence[float], selection: Mapping[str, Any]) -> list[int]:
    """Indices of the values that a selection keeps, the largest absolute value first, ties in the order given."""
    size = np.abs(np.asarray(values, np.float64))
    order = np.argsort(-size, kind="stable")
    if "top" in selection:
        return order[: selection["top"]].tolist()
    return order[size[order] > selection["threshold"]].tolist()

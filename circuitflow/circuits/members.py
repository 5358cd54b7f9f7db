"""What an assembled circuit is made of: its nodes as interventions name them, and edges between them from tables."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from circuitflow.attribution.nodes import SUMMED, strength
from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node
from circuitflow.store.tables import read_provenance, read_table


def circuit_nodes(
    circuit: Circuit, ranking: str = "absolute"
) -> tuple[list[tuple[str, int, int]], np.ndarray]:
    """The nodes of an assembled circuit and their strengths; its edges play no part in an ablation of nodes."""
    nodes = [
        (node.site, node.feature, SUMMED if node.position is None else node.position)
        for node in circuit.nodes
    ]
    return nodes, strength(np.array([node.score for node in circuit.nodes], np.float64), ranking)


def edges_between(path: Path, nodes: Sequence[Node]) -> list[Edge]:
    """Edges of one table of score_edges between these nodes, or to the metric; weights of exactly 0 are no edges."""
    down_site = read_provenance(path)["params"]["down"]
    table = read_table(path)
    ends = {
        (node.site, node.feature, SUMMED if node.position is None else node.position): node.id
        for node in nodes
    }
    found = []
    columns = ("up_site", "up_feature", "up_position", "down_kind", "down_feature", "down_position", "weight")
    rows = zip(*(table[name].tolist() for name in columns), strict=True)
    for up_site, up, up_position, down_kind, down, down_position, weight in rows:
        first = ends.get((up_site, up, up_position))
        second = METRIC if down_kind == "metric" else ends.get((down_site, down, down_position))
        if first is not None and second is not None and weight != 0:
            found.append(Edge(first, second, float(weight)))
    return found

"""The circuit: nodes and edges with their scores, how they were chosen, and what their numbers mean."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from circuitflow.errors import UserError
from circuitflow.provenance import canonical_json, digest
from circuitflow.store.files import read_json, write_json

FORMAT = "circuitflow.circuit.1"

METRIC = "metric"
"""Where the edges of the last site lead. It is the end of every path and is not listed among the nodes."""

Kind = Literal["feature", "error"]


@dataclass(frozen=True)
class Node:
    """A feature or the error of one site, summed over positions unless ``position`` names one."""

    site: str
    kind: Kind
    feature: int
    """Number of the feature in the site's dictionary; −1 for the error."""
    score: float
    """Indirect effect on the training pairs; positive: the clean value supports the clean answer."""
    position: int | None = None

    @property
    def id(self) -> str:
        """``resid.12/431``, ``resid.12/error``; ``resid.12/431@5`` at one position."""
        name = f"{self.site}/{'error' if self.kind == 'error' else self.feature}"
        return name if self.position is None else f"{name}@{self.position}"


@dataclass(frozen=True)
class Edge:
    """An effect that one node has through another: ids of its ends (``down`` may be :data:`METRIC`) and its weight."""

    up: str
    down: str
    weight: float


@dataclass(frozen=True)
class Circuit:
    """Nodes by site (in order of depth) and falling |score|, edges by falling |weight|, and how they were chosen."""

    sites: tuple[str, ...]
    """Every site of the run, whether it has nodes or not: nodes elsewhere were never candidates."""
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    selection: Mapping[str, Any] = field(default_factory=dict)
    """The rule by which nodes and edges were chosen, and what it left out."""
    conventions: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def at(self, site: str) -> tuple[Node, ...]:
        """The nodes of one site."""
        return tuple(node for node in self.nodes if node.site == site)


def write_circuit(path: Path, circuit: Circuit) -> None:
    """Write a circuit as JSON; equal circuits give equal bytes, ``content`` digests all but the provenance."""
    said = {
        "format": FORMAT,
        "sites": list(circuit.sites),
        "nodes": [{"id": node.id, **vars(node)} for node in circuit.nodes],
        "edges": [dict(vars(edge)) for edge in circuit.edges],
        "selection": dict(circuit.selection),
        "conventions": dict(circuit.conventions),
    }
    content = digest(canonical_json(said))
    write_json(path, {**said, "content": content, "provenance": dict(circuit.provenance)})


def read_circuit(path: Path) -> Circuit:
    """Read what :func:`write_circuit` wrote.

    :raises UserError: missing, not JSON, or not a circuit of this format.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(
            f"File {path} is not a circuit of the format {FORMAT}; run the stage assemble_circuit again."
        )
    nodes = tuple(Node(**{key: node[key] for key in Node.__dataclass_fields__}) for node in value["nodes"])
    edges = tuple(Edge(**edge) for edge in value["edges"])
    return Circuit(
        tuple(value["sites"]), nodes, edges, value["selection"], value["conventions"], value["provenance"]
    )


def write_graphml(path: Path, circuit: Circuit) -> None:
    """Write a circuit as GraphML, for networkx, Gephi, Cytoscape …; the metric is a node of its own there."""
    import networkx

    from circuitflow.store.files import atomic_path

    graph: networkx.DiGraph = networkx.DiGraph()
    for node in circuit.nodes:
        known = {key: value for key, value in vars(node).items() if value is not None}
        graph.add_node(node.id, **known, magnitude=abs(node.score))
    graph.add_node(METRIC, site=METRIC, kind=METRIC)
    for edge in circuit.edges:
        graph.add_edge(edge.up, edge.down, weight=edge.weight, magnitude=abs(edge.weight))
    with atomic_path(path) as temporary:
        networkx.write_graphml_xml(graph, temporary)


def without_path_to_metric(nodes: Iterable[Node], edges: Iterable[Edge]) -> list[str]:
    """Ids of the nodes from which no chain of edges leads to the metric, in the order given."""
    into: dict[str, list[str]] = {}
    for edge in edges:
        into.setdefault(edge.down, []).append(edge.up)
    reached: set[str] = set()
    waiting = [METRIC]
    while waiting:
        fresh = [up for up in into.get(waiting.pop(), []) if up not in reached]
        reached.update(fresh)
        waiting.extend(fresh)
    return [node.id for node in nodes if node.id not in reached]

"""The circuit: nodes and edges with their scores, how they were chosen, and what their numbers mean."""

import math
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
    try:
        circuit = _parsed(value)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"Circuit {path} is damaged or was edited ({error}); run the stage assemble_circuit again."
        ) from None
    return circuit


def _parsed(value: Mapping[str, Any]) -> Circuit:
    nodes = tuple(Node(**{key: node[key] for key in Node.__dataclass_fields__}) for node in value["nodes"])
    edges = tuple(Edge(**edge) for edge in value["edges"])
    names = {node.id for node in nodes}
    unknown = {end for edge in edges for end in (edge.up, edge.down)} - names - {METRIC}
    if len(names) < len(nodes) or unknown:
        raise ValueError(f"an edge names {min(unknown)}" if unknown else "a node is listed twice")
    if not all(math.isfinite(number) for number in (*(n.score for n in nodes), *(e.weight for e in edges))):
        raise ValueError("a score or weight is not a number")
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


DOT_COLOURS = {"positive": "#2166ac", "negative": "#b2182b", "error": "#d98200", "metric": "#1c2024"}
"""Of the figures' palette."""
DOT_WIDTHS = 0.5, 5.0


def write_dot(path: Path, circuit: Circuit, labels: Mapping[str, str] | None = None) -> None:
    """Write a circuit for Graphviz: from the bottom up, sites in ranks, looks as in the figure.

    :param labels: more text for nodes, by id, for example what features fire on; it goes on a line of its own.
    """
    from circuitflow.store.files import atomic_path

    told = labels or {}
    lines = [
        "digraph circuit {",
        "  rankdir=BT;",
        '  node [fontname="DejaVu Sans", fontsize=10, style=filled];',
    ]
    top = max((abs(node.score) for node in circuit.nodes), default=0.0) or 1.0
    for site in circuit.sites:
        nodes = circuit.at(site)
        if nodes:
            named = [f"  {_dot_node(node, told.get(node.id, ''), abs(node.score) / top)}" for node in nodes]
            lines += [f"  subgraph {_quoted('rank ' + site)} {{", "    rank=same;"]
            lines += [f"  {line}" for line in named] + ["  }"]
    looks = {"shape": "diamond", "fillcolor": DOT_COLOURS["metric"], "fontcolor": "white", "site": METRIC}
    lines.append(f"  {_quoted(METRIC)} [{_attributes({'label': METRIC, **looks})}];")
    widest = max((abs(edge.weight) for edge in circuit.edges), default=0.0) or 1.0
    lines += [f"  {_dot_edge(edge, abs(edge.weight) / widest)}" for edge in circuit.edges]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")


def _dot_node(node: Node, more: str, share: float) -> str:
    error = node.kind == "error"
    colour = DOT_COLOURS["positive" if node.score >= 0 else "negative"]
    text = f"{node.id}\n{node.score:+.3g}" + (f"\n{more}" if more else "")
    looks = {
        "label": text,
        "shape": "triangle" if error else "box",
        "color": DOT_COLOURS["error"] if error else colour,
        "fillcolor": f"{colour}{round(255 * (0.05 + 0.5 * share)):02x}",
        "penwidth": "2" if error else "1",
        "site": node.site,
        "kind": node.kind,
        "feature": str(node.feature),
        "score": repr(float(node.score)),
    }
    place = {} if node.position is None else {"position": str(node.position)}
    return f"{_quoted(node.id)} [{_attributes({**looks, **place})}];"


def _dot_edge(edge: Edge, share: float) -> str:
    thin, thick = DOT_WIDTHS
    looks = {
        "color": DOT_COLOURS["positive" if edge.weight >= 0 else "negative"],
        "penwidth": f"{thin + (thick - thin) * share**0.5:.2f}",
        "effect": repr(float(edge.weight)),
    }
    return f"{_quoted(edge.up)} -> {_quoted(edge.down)} [{_attributes(looks)}];"


def _attributes(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={_quoted(value)}" for name, value in values.items())


def _quoted(text: str) -> str:
    """A DOT string: quotes and backslashes escaped, line breaks as ``\\n``."""
    safe = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + safe.replace("\r", "").replace("\n", "\\n") + '"'


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

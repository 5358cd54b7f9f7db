"""Circuits of the mechanistic interpretability benchmark (MIB): components of a transformer as JSON, in and out.

A file holds ``cfg`` {n_layers, n_heads, parallel_attn_mlp, d_model}, ``nodes`` {name: {in_graph [, score, neurons,
neurons_scores]}} and ``edges`` {"a0.h1->m2": {score, in_graph}}, where edges into a head say which of its inputs they
reach ("input->a0.h1<q>"). Nodes are "input" (the site embed), "a{L}.h{H}" (a head: its coordinates of z.L), "m{L}"
(mlp.L) and "logits" (the metric). Neurons are coordinates of a component's output, so that here they exist of "input"
and "m{L}" alone.

In circuitflow a whole component is the error node of a site without dictionary (kind none), coordinates are features of
an identity dictionary. A circuit that was read carries the file under ``selection["mib"]``: written as it is, it gives
the same file; of a circuit that was changed, nodes and edges are written as they are now, and the file is asked for
nothing but what a circuit of ours cannot hold (scores outside of the circuit, edges that touch heads or neurons).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node
from circuitflow.errors import UserError
from circuitflow.models.sites import depth_order, parse_site
from circuitflow.store.files import read_json, write_json

KEYS = ("n_layers", "n_heads", "parallel_attn_mlp", "d_model")
INPUTS = "qkv"
EDGE = re.compile(r"(.+)->([^<]+)(<[qkv]>)?")
CONVENTIONS = {
    "nodes": "error: the whole component (a site without dictionary); features: its coordinates (an identity "
    "dictionary)",
    "heads": "the coordinates of z.L that belong to the head, each with an equal part of its score",
    "edges": "between components, in selection.mib; those whose ends are single nodes here are listed as edges too",
    "score": "as in the file; unscored nodes have 0",
}


@dataclass(frozen=True)
class Shape:
    """What the names of a model's components follow from."""

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    parallel: bool = False

    def as_cfg(self) -> dict[str, Any]:
        """The file's ``cfg``."""
        return {
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "parallel_attn_mlp": self.parallel,
            "d_model": self.d_model,
        }

    def components(self) -> Iterator[str]:
        """Names of everything that writes to the stream, in order."""
        yield "input"
        for layer in range(self.n_layers):
            yield from (f"a{layer}.h{head}" for head in range(self.n_heads))
            yield f"m{layer}"

    def edges(self) -> Iterator[tuple[str, str]]:
        """All pairs of components of which the second reads what the first writes, without inputs of heads."""
        before = ["input"]
        for layer in range(self.n_layers):
            heads, mlp = [f"a{layer}.h{head}" for head in range(self.n_heads)], f"m{layer}"
            yield from ((up, head) for up in before for head in heads)
            seen = before if self.parallel else [*before, *heads]
            yield from ((up, mlp) for up in seen)
            before = [*before, *heads, mlp]
        yield from ((up, "logits") for up in before)


def read_mib(path: Path, d_head: int | None = None) -> Circuit:
    """A circuit from a file of the benchmark.

    :param d_head: width of a head, where it is not d_model / n_heads.
    :raises UserError: it is no such file, or names a component that its ``cfg`` does not have.
    """
    value = read_json(path)
    if not isinstance(value, dict) or not all(
        isinstance(value.get(key), dict) for key in ("cfg", "nodes", "edges")
    ):
        raise UserError(f"File {path} is no MIB circuit: it needs the keys cfg, nodes and edges.")
    cfg = value["cfg"]
    if missing := [key for key in KEYS if key not in cfg]:
        raise UserError(
            f"MIB circuit {path} says nothing of {missing[0]} in its cfg; it needs {', '.join(KEYS)}."
        )
    shape = checked_shape(cfg, d_head, path)
    for part in ("nodes", "edges"):
        for name, told in value[part].items():
            _check_entry(name, told, part, path)
    known = {*shape.components(), "logits"}
    if unknown := sorted(set(value["nodes"]) - known):
        raise UserError(
            f"MIB circuit {path} names a node '{unknown[0]}' that a model of its cfg does not have."
        )
    nodes, edges = held(value, shape, path)
    sites = sorted(
        {_site(name) for name in shape.components()}, key=lambda site: depth_order(parse_site(site))
    )
    return Circuit(
        tuple(sites),
        nodes,
        edges,
        {"mib": {"cfg": dict(cfg), "nodes": value["nodes"], "edges": value["edges"]}, "d_head": shape.d_head},
        CONVENTIONS,
        {"format": "mib"},
    )


def shape_of_cfg(cfg: Mapping[str, Any], d_head: int | None = None) -> Shape:
    """The shape that a file's ``cfg`` tells; ``d_head`` where it is not d_model / n_heads."""
    layers, heads, width = (int(cfg[key]) for key in ("n_layers", "n_heads", "d_model"))
    return Shape(layers, heads, width, d_head or width // heads, bool(cfg["parallel_attn_mlp"]))


def checked_shape(cfg: Mapping[str, Any], d_head: int | None, path: Path) -> Shape:
    """:func:`shape_of_cfg` of a file of somebody else's.

    :raises UserError: a number is none, or they do not fit each other.
    """
    for key in ("n_layers", "n_heads", "d_model"):
        if type(cfg[key]) is not int or cfg[key] < 1:
            raise UserError(
                f"MIB circuit {path} has {key} {cfg[key]!r} in its cfg; it takes a positive whole number."
            )
    if not isinstance(cfg["parallel_attn_mlp"], bool):
        raise UserError(
            f"MIB circuit {path} has parallel_attn_mlp {cfg['parallel_attn_mlp']!r} in its cfg; it takes true or false."
        )
    if d_head is None and cfg["d_model"] % cfg["n_heads"]:
        raise UserError(
            f"MIB circuit {path} has d_model {cfg['d_model']} and n_heads {cfg['n_heads']} in its cfg, which do not "
            "tell the width of a head; name the model's folder."
        )
    return shape_of_cfg(cfg, d_head)


def _check_entry(name: str, told: Any, part: str, path: Path) -> None:
    """What the file says of a node or an edge.

    :raises UserError: it is not an object, or a value in it is of another kind.
    """
    where = f"MIB circuit {path} has at {part[:-1]} '{name}'"
    if not isinstance(told, Mapping):
        raise UserError(f"{where} {told!r}; an object with in_graph and score is expected.")
    if not isinstance(told.get("in_graph", False), bool):
        raise UserError(f"{where} in_graph {told['in_graph']!r}; it takes true or false.")
    if told.get("score") is not None and not _is_number(told["score"]):
        raise UserError(f"{where} score {told['score']!r}; it takes a number.")
    if part == "edges" or "neurons" not in told:
        return
    neurons, scores = told["neurons"], told.get("neurons_scores")
    if not isinstance(neurons, list) or not all(isinstance(one, bool) for one in neurons):
        raise UserError(
            f"{where} neurons that are not a list of true and false; leave the key out for a whole node."
        )
    if scores is None:
        return
    if not isinstance(scores, list) or not all(one is None or _is_number(one) for one in scores):
        raise UserError(f"{where} neurons_scores that are not a list of numbers.")
    if len(scores) != len(neurons):
        raise UserError(
            f"{where} {len(neurons)} neurons but {len(scores)} neurons_scores; they come in pairs."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def held(value: Mapping[str, Any], shape: Shape, path: Path) -> tuple[tuple[Node, ...], tuple[Edge, ...]]:
    """The nodes and edges of a file's ``nodes`` and ``edges`` that a circuit of ours can hold.

    :raises UserError: they do not fit the shape.
    """
    nodes = [
        node
        for name, told in value["nodes"].items()
        if name != "logits" and told.get("in_graph")
        for node in _nodes(name, told, shape, path)
    ]
    nodes.sort(key=lambda node: (depth_order(parse_site(node.site)), -abs(node.score), node.feature))
    known = {*shape.components(), "logits"}
    _check_order(value["edges"], known, shape, path)
    return tuple(nodes), tuple(_edges(value["edges"], {node.id for node in nodes}, known, path))


def _check_order(edges: Mapping[str, Any], known: set[str], shape: Shape, path: Path) -> None:
    """Edges lead from what is written to what reads it.

    :raises UserError: one leads backwards, so that the circuit would have a cycle.
    """
    possible = set(shape.edges())
    for name in edges:
        found = EDGE.fullmatch(name)
        if found and {found[1], found[2]} <= known and (found[1], found[2]) not in possible:
            raise UserError(
                f"MIB circuit {path} has an edge '{name}', but in a model of its cfg {found[2]} does not read "
                f"{found[1]}; take it out."
            )


def write_mib(path: Path, circuit: Circuit, shape: Shape | None = None) -> None:
    """Write a circuit of whole components, or of coordinates of embed and mlp sites, for the benchmark.

    An edge of ours into a head is one into each of its inputs; without edges, all between the circuit's components are
    in. For a circuit that :func:`read_mib` made see :func:`circuitflow.circuits.formats.mib_edits.revised`.

    :raises UserError: a node or edge has no counterpart there (a dictionary's feature, part of a head, another site, a
    position), or contradicts what the file says.
    """
    from circuitflow.circuits.formats.mib_edits import revised

    kept = circuit.selection.get("mib")
    if kept is not None:
        known = shape_of_cfg(kept["cfg"], circuit.selection.get("d_head"))
        if shape not in (None, known):
            raise UserError(
                f"The circuit was read from a MIB file of {known}, and the model named is {shape}; "
                "name no model, or the file's own."
            )
        write_json(path, revised(kept, circuit, known, path))
        return
    if shape is None:
        raise UserError(
            "Writing a MIB circuit takes the model's shape (layers, heads, width); name the model's folder."
        )
    write_json(path, {"cfg": shape.as_cfg(), **_described(circuit, shape)})


def _described(circuit: Circuit, shape: Shape) -> dict[str, Any]:
    inside = by_component(circuit.nodes, shape)
    nodes: dict[str, Any] = {name: told_of(name, inside.get(name, []), shape) for name in shape.components()}
    nodes["logits"] = {"in_graph": True}
    weights = between_components(circuit.nodes, circuit.edges, shape)
    edges = {}
    for up, down in shape.edges():
        present = up in inside and (down in inside or down == "logits")
        told = {"score": weights.get((up, down), 0.0)}
        told["in_graph"] = (up, down) in weights if circuit.edges else present
        for name in names_of(up, down):
            edges[name] = dict(told)
    return {"nodes": nodes, "edges": edges}


def names_of(up: str, down: str) -> list[str]:
    """What the file calls an edge; one into a head has an entry for each of its inputs."""
    return [f"{up}->{down}<{letter}>" for letter in INPUTS] if down[0] == "a" else [f"{up}->{down}"]


def by_component(nodes: Sequence[Node], shape: Shape) -> dict[str, list[Node]]:
    """Nodes by the components that they stand for.

    :raises UserError: a node has no counterpart in a file.
    """
    inside: dict[str, list[Node]] = {}
    for node in nodes:
        for name in _components(node, shape):
            inside.setdefault(name, []).append(node)
    return inside


def between_components(
    nodes: Sequence[Node], edges: Sequence[Edge], shape: Shape
) -> dict[tuple[str, str], float]:
    """Summed weights of edges by the components that they join.

    :raises UserError: an edge joins two of which the second does not read the first.
    """
    weights: dict[tuple[str, str], float] = {}
    possible = set(shape.edges())
    owners = {node.id: _components(node, shape) for node in nodes} | {METRIC: ["logits"]}
    for edge in edges:
        for up, down in product(owners[edge.up], owners[edge.down]):
            if (up, down) not in possible:
                raise UserError(
                    f"Edge {edge.up} → {edge.down} has no counterpart in a MIB circuit, where {down} does not "
                    f"read {up}."
                )
            part = edge.weight / len(owners[edge.up]) / len(owners[edge.down])
            weights[up, down] = weights.get((up, down), 0.0) + part
    return weights


def told_of(name: str, nodes: Sequence[Node], shape: Shape) -> dict[str, Any]:
    """What the file says of one component."""
    told: dict[str, Any] = {"in_graph": bool(nodes)}
    if nodes:
        parts = shape.n_heads if name[0] == "a" and nodes[0].kind == "error" else 1
        told["score"] = math.fsum(node.score for node in nodes) / parts
    features = [node for node in nodes if node.kind == "feature"]
    if name[0] == "a" and features and len(features) < shape.d_head:
        raise UserError(
            f"Head {name} is in the circuit with {len(features)} of {shape.d_head} coordinates, and MIB knows whole "
            f"heads "
            "alone; keep all of them or none."
        )
    if features and name[0] != "a":
        scores = {node.feature: node.score for node in features}
        told["neurons"] = [index in scores for index in range(shape.d_model)]
        told["neurons_scores"] = [scores.get(index, 0.0) for index in range(shape.d_model)]
    return told


def _components(node: Node, shape: Shape) -> list[str]:
    """The components that a node of ours stands for."""
    site = parse_site(node.site)
    whole = node.kind == "error"
    width = shape.n_heads * shape.d_head if site.kind == "z" else shape.d_model
    if (
        node.position is not None
        or site.kind not in ("embed", "z", "mlp")
        or (not whole and node.feature >= width)
    ):
        raise UserError(
            f"Node {node.id} has no counterpart in a MIB circuit, which holds embed, heads (z) and MLPs, whole or by "
            "coordinates, summed over positions; score with dictionaries of kind none or identity at these sites."
        )
    if site.kind != "z":
        return ["input" if site.kind == "embed" else f"m{site.layer}"]
    if whole:
        return [f"a{site.layer}.h{head}" for head in range(shape.n_heads)]
    return [f"a{site.layer}.h{node.feature // shape.d_head}"]


def _site(name: str) -> str:
    if name == "input":
        return "embed"
    layer = name[1:].partition(".")[0]
    return f"z.{layer}" if name[0] == "a" else f"mlp.{layer}"


def _nodes(name: str, told: Mapping[str, Any], shape: Shape, path: Path) -> list[Node]:
    score = _number(told.get("score"))
    if name[0] == "a":
        first = int(name.partition(".h")[2]) * shape.d_head
        part = score / shape.d_head
        return [Node(_site(name), "feature", first + i, part) for i in range(shape.d_head)]
    if "neurons" not in told:
        return [Node(_site(name), "error", -1, score)]
    neurons = told["neurons"]
    if len(neurons) != shape.d_model:
        raise UserError(
            f"MIB circuit {path} has {len(neurons)} neurons at {name} but a model of width {shape.d_model}; "
            "its cfg and its nodes do not fit."
        )
    scores = told.get("neurons_scores") or [0.0] * len(neurons)
    return [
        Node(_site(name), "feature", index, _number(scores[index]))
        for index, inside in enumerate(neurons)
        if inside
    ]


def _edges(told: Mapping[str, Any], nodes: set[str], known: set[str], path: Path) -> Iterator[Edge]:
    """Edges whose two ends are each one node here."""
    for name, edge in sorted(told.items(), key=lambda item: (-abs(_number(item[1].get("score"))), item[0])):
        found = EDGE.fullmatch(name)
        if found is None or found[1] not in known or found[2] not in known:
            raise UserError(f"MIB circuit {path} has an edge '{name}' between no components of its cfg.")
        up = f"{_site(found[1])}/error"
        down = METRIC if found[2] == "logits" else f"{_site(found[2])}/error"
        if edge.get("in_graph") and up in nodes and (down == METRIC or down in nodes) and not found[3]:
            yield Edge(up, down, _number(edge.get("score")))


def _number(value: Any) -> float:
    number = 0.0 if value is None else float(value)
    return number if math.isfinite(number) else 0.0

"""MIB files of circuits that were changed since they were read: what is ours is written as it is now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuitflow.circuits.circuit import Circuit, Node
from circuitflow.circuits.formats.mib import (
    Shape,
    between_components,
    by_component,
    held,
    names_of,
    told_of,
)
from circuitflow.errors import UserError

Nodes = Mapping[str, list[Node]]


def revised(kept: Mapping[str, Any], circuit: Circuit, shape: Shape, path: Path) -> dict[str, Any]:
    """A MIB file from the one that a circuit was read from and the circuit as it is now.

    Components and edges that are as the file told them keep their entries, whatever else these say. A component or
    edge that left the circuit keeps its score and is no longer in the graph, nor is an edge of a component that left.

    :param kept: ``cfg``, ``nodes`` and ``edges`` of the file.
    :raises UserError: a node or edge has no counterpart in a file, or an edge was added between components of which
    the file already tells edges that our circuits cannot hold.
    """
    nodes, edges = held(kept, shape, path)
    was, now = by_component(nodes, shape), by_component(circuit.nodes, shape)
    told = {name: dict(entry) for name, entry in kept["nodes"].items()}
    for name in shape.components():
        if _scores(was, name) != _scores(now, name):
            told[name] = _component(name, told.get(name, {}), was, now, shape)
    weights = (
        between_components(nodes, edges, shape),
        between_components(circuit.nodes, circuit.edges, shape),
    )
    left = {name for name in was if name not in now}
    return {"cfg": dict(kept["cfg"]), "nodes": told, "edges": _edges(kept["edges"], *weights, left, shape)}


def _scores(nodes: Nodes, name: str) -> dict[str, float]:
    return {node.id: node.score for node in nodes.get(name, [])}


def _component(name: str, entry: Mapping[str, Any], was: Nodes, now: Nodes, shape: Shape) -> dict[str, Any]:
    """The entry of a component that changed."""
    found = told_of(name, now.get(name, []), shape)
    merged = {**entry, **found}
    if "neurons" in found:
        scores = entry.get("neurons_scores") or [0.0] * shape.d_model
        inside = zip(found["neurons"], found["neurons_scores"], scores, strict=True)
        merged["neurons_scores"] = [ours if here else theirs for here, ours, theirs in inside]
        if "score" in entry and all(node.kind == "feature" for node in was.get(name, [])):
            merged["score"] = entry["score"]  # of the whole component, which is no node of ours
    elif "neurons" in entry and name[0] != "a":
        if name in now:  # whole
            del merged["neurons"]
            merged.pop("neurons_scores", None)
        else:
            merged["neurons"] = [False] * shape.d_model
    return merged


def _edges(
    kept: Mapping[str, Mapping[str, Any]],
    was: Mapping[tuple[str, str], float],
    now: Mapping[tuple[str, str], float],
    left: set[str],
    shape: Shape,
) -> dict[str, dict[str, Any]]:
    """The file's edges: those of ours as they are now, the others as they were while both their ends are there."""
    told = {name: dict(entry) for name, entry in kept.items()}
    for ends in shape.edges():
        names = names_of(*ends)
        if ends in now and now[ends] != was.get(ends):
            if ends not in was and any(told.get(name, {}).get("in_graph") for name in names):
                raise UserError(
                    f"Edge {ends[0]}->{ends[1]} was added to a circuit whose MIB file already tells edges between the "
                    "two, of heads or neurons; change the file, or take its edges out of selection.mib."
                )
            for name in names:
                told[name] = {**told.get(name, {}), "score": now[ends], "in_graph": True}
        elif (ends in was and ends not in now) or left & set(ends):
            for name in names:
                if name in told:
                    told[name]["in_graph"] = False
    return told

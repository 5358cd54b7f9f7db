"""Stage ``group_features``: supernodes of an attribution graph, by hand and found, and the graph between them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.errors import UserError
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.grouping import Nodes, groups
from circuitflow.graphs.influence import Kept, prune
from circuitflow.graphs.likeness import Likeness, likeness
from circuitflow.graphs.naming import nodes_named
from circuitflow.jobs import Output
from circuitflow.store.files import write_json
from circuitflow.store.tables import write_table

HAND, FOUND, SINGLE, ERRORS = "by hand", "automatic", "single", "errors"
CONVENTIONS = {
    "similarity": "share x cosine of virtual weights (mean of in and out) + (1 - share) x correlation of activations "
    "over the corpus; of features never active there the virtual weights alone",
    "groups": "average linkage of the features of the pruned graph that no supernode by hand has",
    "weight": "sum of the effects of a supernode's members on another's (activations of targets are in units of their "
    "own, so that sums over several targets mix units)",
    "flow": "influence along the edges between two supernodes, as a share of all edges of the pruned graph",
    "errors": "the error nodes of one position are one node here",
}


def group_features(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Supernodes of one prompt's graph and the effects between them.

    Inputs ``model``, ``graph``, ``dictionaries`` (list), ``activations`` (store with the sites that they read) and
    ``corpus``; params ``by_hand`` (name → ids), ``automatic``, ``similarity``, ``virtual_weight``, ``positions``,
    ``max_layers``, ``contexts``, ``node_share`` and ``edge_share`` (of pruning), ``dtype``, ``compute``.

    Outputs:

    - ``supernodes`` (JSON): supernodes (name → ids of features), kinds, labels (what the group fires on), kept (the
      pruned graph's nodes);
    - ``nodes``: node, kind (feature | error | token | logit), layer, position, supernode, supernode_kind (by hand |
      automatic | single | errors), label, influence, similarity, virtual, coactivation (means over the group's other
      members; NaN where there is none);
    - ``edges``: source, target (supernodes), weight, absolute (sum of |effects|), flow, edges (how many).

    :raises UserError: one feature is in two supernodes by hand.
    """
    graph = Graph.load(Path(inputs["graph"]))
    kept = prune(graph, params["node_share"], params["edge_share"])
    hand = chosen_by_hand(graph, params["by_hand"])
    taken = {node for members in hand.values() for node in members}
    free = np.array(
        [node for node in np.flatnonzero(kept.nodes[: graph.first_error]) if node not in taken], np.int64
    )
    alike = likeness(inputs, params, graph, np.array(sorted({*free.tolist(), *taken}), np.int64))
    found = found_groups(graph, kept, free, alike, params) if params["automatic"] and len(free) else {}
    named = hand | {f"group-{number + 1}": members for number, members in enumerate(found.values())}
    kinds = dict.fromkeys(hand, HAND) | dict.fromkeys([name for name in named if name not in hand], FOUND)
    labels = {name: alike.label(members) for name, members in named.items()}
    alone = set(alike.nodes.tolist()) - {node for members in named.values() for node in members}
    words = labels | {graph.node_id(node): alike.label([node]) for node in sorted(alone)}
    ids = graph.node_ids()
    write_json(
        out.files["supernodes"],
        {
            "supernodes": {name: [ids[node] for node in members] for name, members in named.items()},
            "kinds": kinds,
            "labels": labels,
            "kept": [ids[node] for node in np.flatnonzero(kept.nodes)],
            "provenance": out.provenance,
        },
    )
    facts = {**out.provenance, "conventions": CONVENTIONS, "prompt": graph.prompt}
    facts |= {"tokens": list(graph.tokens), "logit_tokens": list(graph.logit_tokens)}  # for the figure
    write_table(out.files["nodes"], node_table(graph, kept, named, kinds, words, alike), facts)
    write_table(out.files["edges"], edge_table(graph, kept, named), facts)


def chosen_by_hand(graph: Graph, said: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Numbers of the nodes of supernodes by hand; supernodes without a node in this graph are left out.

    :raises UserError: one feature is in two of them.
    """
    found = {name: nodes_named(ids, graph) for name, ids in said.items()}
    owner: dict[int, str] = {}
    for name, members in found.items():
        for node in members:
            if owner.setdefault(node, name) != name:
                raise UserError(
                    f"Feature {graph.node_id(node)} is in the supernodes '{owner[node]}' and '{name}'; take it out of "
                    "one of them."
                )
    return {name: members for name, members in found.items() if members}


def found_groups(
    graph: Graph, kept: Kept, free: np.ndarray, alike: Likeness, params: Mapping[str, Any]
) -> dict[int, list[int]]:
    """Groups of at least two of the free features, the one with most influence first."""
    nodes = Nodes(graph.features[free, 0], graph.features[free, 1])
    label = groups(
        alike.of(alike.similarity, free.tolist()),
        nodes,
        params["similarity"],
        params["positions"],
        params["max_layers"],
    )
    members = {int(number): free[label == number].tolist() for number in np.unique(label)}
    several = {number: these for number, these in members.items() if len(these) > 1}
    order = sorted(several, key=lambda number: -float(kept.influence[several[number]].sum()))
    return {number: several[number] for number in order}


def supernode_of(graph: Graph, kept: Kept, named: Mapping[str, Sequence[int]]) -> dict[int, str]:
    """The supernode of every node that the pruned graph or a supernode has; single nodes are their own."""
    owner = {node: name for name, members in named.items() for node in members}
    for node in np.flatnonzero(kept.nodes).tolist():
        if graph.kind(node) == "error":
            owner[node] = f"errors_{graph.errors[node - graph.first_error, 1]}"
        else:
            owner.setdefault(node, graph.node_id(node))
    return owner


def node_table(
    graph: Graph,
    kept: Kept,
    named: Mapping[str, Sequence[int]],
    kinds: Mapping[str, str],
    labels: Mapping[str, str],
    alike: Likeness,
) -> dict[str, list[Any]]:
    """The table ``nodes``."""
    owner = supernode_of(graph, kept, named)
    layers, positions = graph.layers(), graph.positions()
    near = {node: values for members in named.values() for node, values in _closeness(alike, members).items()}
    columns: dict[str, list[Any]] = {name: [] for name in NODES}
    for node in sorted(owner):
        name, kind = owner[node], graph.kind(node)
        similarity, virtual, coactive = near.get(node, (float("nan"),) * 3)
        row = (
            graph.node_id(node), kind, int(layers[node]), int(positions[node]), name,
            ERRORS if kind == "error" else kinds.get(name, SINGLE), labels.get(name, ""),
            float(kept.influence[node]), similarity, virtual, coactive,
        )  # fmt: skip
        for column, value in zip(NODES, row, strict=True):
            columns[column].append(value)
    return columns


NODES = (
    "node", "kind", "layer", "position", "supernode", "supernode_kind", "label", "influence", "similarity", "virtual",
    "coactivation",
)  # fmt: skip
EDGES = ("source", "target", "weight", "absolute", "flow", "edges")


def _closeness(alike: Likeness, members: Sequence[int]) -> dict[int, tuple[float, float, float]]:
    """Mean similarities of each member to the others."""
    if len(members) < 2:
        return {}
    means = []
    for square in (alike.similarity, alike.virtual, alike.coactive):
        part = alike.of(square, members).astype(np.float64)
        np.fill_diagonal(part, np.nan)
        known = np.isfinite(part)
        count = known.sum(axis=1)
        means.append(np.where(count > 0, np.where(known, part, 0).sum(axis=1) / np.maximum(count, 1), np.nan))
    return {node: (float(a), float(b), float(c)) for node, a, b, c in zip(members, *means, strict=True)}


def edge_table(graph: Graph, kept: Kept, named: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
    """The table ``edges``: edges of the pruned graph summed between supernodes, those within one left out."""
    owner = supernode_of(graph, kept, named)
    whole = max(float(kept.shares.sum()), 1e-30)
    sums: dict[tuple[str, str], list[float]] = {}
    for (target, source), weight, share in zip(kept.edges.tolist(), kept.weights, kept.shares, strict=True):
        ends = owner[source], owner[target]
        if ends[0] == ends[1]:
            continue
        so_far = sums.setdefault(ends, [0.0, 0.0, 0.0, 0])
        for place, value in enumerate((float(weight), abs(float(weight)), float(share) / whole, 1)):
            so_far[place] += value
    rows = [(*ends, *values) for ends, values in sorted(sums.items(), key=lambda one: (-one[1][2], one[0]))]
    return {name: [row[place] for row in rows] for place, name in enumerate(EDGES)}

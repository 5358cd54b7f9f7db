"""Attribution graphs as circuit-tracer's viewer and Neuronpedia read them: {metadata, qParams, nodes, links}.

Names are those of circuit-tracer 0.5 (frontend/graph_models.py): a feature is ``layer_feature_position``, its number
the Cantor pairing of layer and feature; a token ``E_token_position``; a logit ``layers+1_token_position``;
``influence`` is the share of all influence that the node and the stronger ones have together. It names an error
``0_layer_position``, which can be the name of a feature of layer 0: here it is ``layer_-1_position``, whose middle is
the number of a feature that does not exist, as in its own field ``feature``. Reading (viewer_reading.py) takes both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.graphs.graph import NO_TOKEN, Graph
from circuitflow.graphs.influence import Kept
from circuitflow.store.files import write_json

TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}
"""``feature_type`` by kind of node; circuit-tracer calls features so even where they write one layer alone."""

OWN = "circuitflow"
"""The key of metadata under which what the format has no place for is kept."""

Labels = Mapping[tuple[int, int], str]
"""What features are, by (layer, feature)."""


@dataclass(frozen=True)
class Told:
    """What a viewer shows beside the graph itself."""

    slug: str
    """Name of the graph, usable in an address."""
    scan: str
    """The model that Neuronpedia has the features under, or a folder of feature files (``./data/features/NAME``)."""
    labels: Labels = field(default_factory=dict)
    supernodes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Node numbers by name; they are pinned."""
    pinned: Sequence[int] = ()
    """Further nodes that are pinned."""
    pruning: Mapping[str, float] = field(default_factory=dict)
    """node_threshold and edge_threshold."""
    feature_url: str | None = None
    """Address below which feature files lie, for Neuronpedia."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For people, and for views of ours: scores, provenance."""


def pair(x: int, y: int) -> int:
    """Cantor's number of a pair, in which y counts within x + y."""
    return (x + y) * (x + y + 1) // 2 + y


def unpair(number: int) -> tuple[int, int]:
    """The pair behind a number of Cantor's."""
    diagonal = (isqrt(8 * number + 1) - 1) // 2
    y = number - diagonal * (diagonal + 1) // 2
    return diagonal - y, y


def viewer_ids(graph: Graph) -> list[str]:
    """The name of every node in the viewer's files."""
    last = graph.n_pos - 1
    features = [f"{layer}_{feature}_{position}" for layer, position, feature in graph.features.tolist()]
    errors = [f"{layer}_-1_{position}" for layer, position in graph.errors.tolist()]
    tokens = [f"E_{token}_{position}" for position, token in enumerate(graph.token_ids.tolist())]
    logits = [f"{layers_of(graph) + 1}_{token}_{last}" for token in logit_numbers(graph)]
    return features + errors + tokens + logits


def logit_numbers(graph: Graph, vocabulary: int | None = None) -> list[int]:
    """The token of each logit node; a direction gets a number after the vocabulary, in the order of the nodes."""
    size = vocabulary or vocabulary_of(graph)
    return [size + rank if token == NO_TOKEN else token for rank, token in enumerate(graph.logits.tolist())]


def vocabulary_of(graph: Graph) -> int:
    """How many tokens the model has; of a graph that does not say, one more than the largest id that it names."""
    known = [*graph.logits.tolist(), *graph.token_ids.tolist()]
    return int(graph.facts.get("vocab_size") or max(known, default=0) + 1)


def layers_of(graph: Graph) -> int:
    """How many layers the model has; of a graph that does not say, one more than the deepest that it names."""
    deepest = [int(part[:, 0].max()) for part in (graph.features, graph.errors) if len(part)]
    return int(graph.facts.get("n_layers", max(deepest, default=-1) + 1))


def cumulative(influence: np.ndarray) -> np.ndarray:
    """For each node the share of all influence that it and the more influential ones have together."""
    order = np.argsort(-influence, kind="stable")
    total = influence.sum()
    shares = np.empty_like(influence, dtype=np.float64)
    shares[order] = np.cumsum(influence[order]) / total if total else 1.0
    return shares


def shown(graph: Graph, kept: Kept) -> np.ndarray:
    """(n_nodes,) bool: nodes in the viewer's file. Tokens and logits stay without edges."""
    used = kept.nodes.copy()
    used[np.setdiff1d(np.arange(graph.first_token), kept.edges)] = False
    return used


def viewer_value(graph: Graph, kept: Kept, told: Told) -> dict[str, Any]:
    """The pruned graph as the plain value of the viewer's JSON.

    Only our own views read a link's ``share``, its part in the influence on the outputs (edge score), and the
    ``weight`` of an output that is a direction, where influence begins: it has no probability.
    """
    ids, shares, used = viewer_ids(graph), cumulative(kept.influence), shown(graph, kept)
    nodes = [_node(graph, ids, node, shares, told) for node in np.flatnonzero(used).tolist()]
    edges = zip(kept.edges.tolist(), kept.weights.tolist(), kept.shares.tolist(), strict=True)
    links = [
        {"source": ids[up], "target": ids[down], "weight": weight, "share": share}
        for (down, up), weight, share in edges
    ]
    supernodes = [
        [name, *(ids[node] for node in members if used[node])] for name, members in told.supernodes.items()
    ]
    supernodes = [members for members in supernodes if len(members) > 1]
    pinned = [ids[node] for node in told.pinned if used[node]]
    pinned += [name for members in supernodes for name in members[1:]]
    q = {"pinnedIds": list(dict.fromkeys(pinned)), "supernodes": supernodes}
    return {
        "metadata": _metadata(graph, told),
        "qParams": {**q, "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": links,
    }


def write_viewer(path: Path, graph: Graph, kept: Kept, told: Told) -> None:
    """Write the viewer's JSON; equal graphs give equal bytes."""
    write_json(path, viewer_value(graph, kept, told))


def _metadata(graph: Graph, told: Told) -> dict[str, Any]:
    value: dict[str, Any] = {
        "slug": told.slug,
        "scan": told.scan,
        "transcoder_list": [],
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "node_threshold": told.pruning.get("node_threshold"),
        "schema_version": 1,
        "info": {"generator": {"name": OWN}},
        "generation_settings": dict(graph.facts.get("settings") or {}),
        "pruning_settings": dict(told.pruning),
        OWN: {"n_layers": layers_of(graph), "facts": dict(graph.facts), **told.facts},
    }
    if told.feature_url is not None:
        value["feature_details"] = {"feature_json_base_url": told.feature_url}
    return value


def _node(graph: Graph, ids: Sequence[str], node: int, shares: np.ndarray, told: Told) -> dict[str, Any]:
    kind = graph.kind(node)
    own: dict[str, Any] = {
        "node_id": ids[node],
        "feature_type": TYPES[kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": "",
        "influence": float(shares[node]),
        "activation": None,
    }
    describe = {"feature": _feature, "error": _error, "token": _token, "logit": _logit}[kind]
    return own | describe(graph, node, told)


def _feature(graph: Graph, node: int, told: Told) -> dict[str, Any]:
    layer, position, feature = graph.features[node].tolist()
    activation = float(graph.activations[node])
    return {
        "feature": pair(layer, feature),
        "layer": str(layer),
        "ctx_idx": position,
        "jsNodeId": f"{layer}_{feature}-0",
        "clerp": told.labels.get((layer, feature), ""),
        "activation": None if np.isnan(activation) else activation,  # not in every viewer's file
    }


def _error(graph: Graph, node: int, told: Told) -> dict[str, Any]:
    del told
    layer, position = graph.errors[node - graph.first_error].tolist()
    return {"feature": -1, "layer": str(layer), "ctx_idx": position, "jsNodeId": f"{layer}_{position}-0"}


def _token(graph: Graph, node: int, told: Told) -> dict[str, Any]:
    del told
    position = node - graph.first_token
    js = f"E_{graph.token_ids[position]}-{position}"
    return {"feature": position, "layer": "E", "ctx_idx": position, "jsNodeId": js}


def _logit(graph: Graph, node: int, told: Told) -> dict[str, Any]:
    del told
    rank, position = node - graph.first_logit, graph.n_pos - 1
    token, weight = logit_numbers(graph)[rank], float(graph.probabilities[rank])
    # The viewer takes a number after "(p=" for the probability; a direction has none.
    direction = graph.logits[rank] == NO_TOKEN
    said: dict[str, Any] = {"weight": weight} if direction else {"token_prob": weight}
    p = f"none, weight {weight:g}" if direction else f"{weight:.3f}"
    return said | {
        "feature": token,
        "layer": str(layers_of(graph) + 1),
        "ctx_idx": position,
        "jsNodeId": f"L_{token}-{position}",
        "clerp": f'Output "{graph.logit_tokens[rank]}" (p={p})',
        "is_target_logit": rank == 0,
        "influence": None,
    }

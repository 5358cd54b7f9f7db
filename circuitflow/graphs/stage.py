"""The stage build_attribution_graph: the graph of one prompt as a file, and its nodes and edges as tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.dictionaries.family import load_family
from circuitflow.graphs.building import Settings, build_graph
from circuitflow.graphs.graph import KINDS, Graph
from circuitflow.graphs.influence import Kept, prune, scores
from circuitflow.jobs import Output
from circuitflow.models.loading import load_model
from circuitflow.store.files import write_json
from circuitflow.store.tables import Columns, write_table

BUILT = ("max_logits", "probability", "max_nodes", "reorder_every", "batch", "keep_all", "prepend_bos")


def build_attribution_graph(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """Stage: attribute the next token of one prompt to features, errors and tokens.

    Inputs: ``model``, ``dictionaries`` (manifests of transcoders, or of one cross-layer transcoder). Params: ``model``
    and ``dictionaries`` (names), ``prompt`` {name, text, targets}, the fields of :class:`Settings`, ``node_share``,
    ``edge_share``, ``dtype``, ``compute``. Outputs: ``graph`` (safetensors), ``nodes`` and ``edges`` (tables; edges
    of the pruned graph alone), ``summary`` (JSON).

    :raises UserError: the prompt has no token, a target is not one token, or a dictionary is no transcoder of the
        model.
    """
    lm = load_model(Path(inputs["model"]), params["dtype"], params["compute"]["device"])
    family = load_family([Path(path) for path in inputs["dictionaries"]])
    prompt = params["prompt"]
    graph = build_graph(
        lm,
        family,
        prompt["text"],
        targets=prompt.get("targets"),
        settings=Settings(**{name: params[name] for name in BUILT}),
        facts={
            "name": prompt["name"],
            "model": params["model"],
            "dictionaries": params["dictionaries"],
            "node_share": params["node_share"],
            "edge_share": params["edge_share"],
        },
    )
    kept = prune(graph, params["node_share"], params["edge_share"])
    graph.save(out.files["graph"])
    write_table(out.files["nodes"], node_columns(graph, kept), out.provenance)
    write_table(out.files["edges"], edge_columns(graph, kept), out.provenance)
    write_json(out.files["summary"], {**summary(graph, kept), "provenance": out.provenance})


def node_columns(graph: Graph, kept: Kept) -> Columns:
    """One row per node, in the order of their numbers.

    ``feature`` is −1 for what is none; ``token`` is the text at the node's position, for a logit its own; ``influence``
    is p·ΣÂᵏ; ``expanded`` says whether the node's incoming effects are in the graph, ``kept`` whether pruning left it.
    """
    kinds, positions = graph.kinds(), graph.positions()
    features, activations = np.full(graph.n_nodes, -1), np.full(graph.n_nodes, np.nan)
    features[: graph.first_error] = graph.features[:, 2]
    activations[: graph.first_error] = graph.activations
    probabilities = np.full(graph.n_nodes, np.nan)
    probabilities[graph.first_logit :] = graph.probabilities
    expanded = np.zeros(graph.n_nodes, dtype=bool)
    expanded[graph.targets] = True
    tokens = [graph.tokens[at] for at in positions[: graph.first_logit]] + list(graph.logit_tokens)
    return {
        "id": graph.node_ids(),
        "kind": [KINDS[kind] for kind in kinds],
        "layer": graph.layers(),
        "position": positions,
        "feature": features.astype(np.int64),
        "token": tokens,
        "activation": activations,
        "probability": probabilities,
        "influence": kept.influence,
        "expanded": expanded,
        "kept": kept.nodes,
    }


def edge_columns(graph: Graph, kept: Kept) -> Columns:
    """One row per edge that pruning left, the largest share of influence first."""
    order = np.argsort(-kept.shares, kind="stable")
    ids = graph.node_ids()
    target, source = kept.edges[order].T
    return {
        "source": [ids[node] for node in source],
        "target": [ids[node] for node in target],
        "weight": kept.weights[order],
        "share": kept.shares[order],
    }


def summary(graph: Graph, kept: Kept) -> dict[str, Any]:
    """Scores, sizes and the check of a graph: each target's incoming effects and biases against its true value."""
    found = scores(graph)
    sizes = np.bincount(graph.kinds(), minlength=len(KINDS))
    left = np.bincount(graph.kinds()[kept.nodes], minlength=len(KINDS))
    logits = zip(graph.logit_tokens, graph.probabilities.tolist(), strict=True)
    return {
        "prompt": graph.prompt,
        "tokens": list(graph.tokens),
        "logits": [{"token": token, "probability": value} for token, value in logits],
        "replacement_score": found.replacement,
        "completeness_score": found.completeness,
        "nodes": dict(zip(KINDS, sizes.tolist(), strict=True)),
        "kept_nodes": dict(zip(KINDS, left.tolist(), strict=True)),
        "edges": int(np.count_nonzero(graph.weights)),
        "kept_edges": len(kept.edges),
        "largest_deviation": largest_deviation(graph),
        "facts": dict(graph.facts),
    }


def largest_deviation(graph: Graph) -> float:
    """The largest |Σ incoming + bias − activation| of any expanded feature, by the largest activation of any."""
    rows = graph.targets < graph.first_error
    if not rows.any():
        return 0.0
    true = graph.activations[graph.targets[rows]]
    return float(np.abs(graph.values()[rows] - true).max() / np.abs(true).max())

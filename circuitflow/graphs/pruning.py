"""The stage prune_graph: which nodes and edges of a graph carry its influence, as tables, and a summary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.graphs.graph import KINDS, NO_TOKEN, Graph
from circuitflow.graphs.influence import Kept, prune, scores
from circuitflow.jobs import Output
from circuitflow.store.files import write_json
from circuitflow.store.tables import Columns, write_table


def prune_graph(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """Stage: tell which nodes and edges of a graph carry its influence, and how much the graph explains.

    Input ``graph``; params ``node_share``, ``edge_share``. Outputs: ``nodes`` (all of them) and ``edges`` (those of the
    pruned graph alone), tables, and ``summary`` (JSON).

    :raises UserError: the graph is missing or damaged.
    """
    graph = Graph.load(Path(inputs["graph"]))
    kept = prune(graph, params["node_share"], params["edge_share"])
    write_table(out.files["nodes"], node_columns(graph, kept), out.provenance)
    write_table(out.files["edges"], edge_columns(graph, kept), out.provenance)
    told = {**summary(graph, kept), "pruning": dict(params), "provenance": out.provenance}
    write_json(out.files["summary"], told)


def node_columns(graph: Graph, kept: Kept) -> Columns:
    """One row per node, in the order of their numbers.

    ``feature`` is −1 for what is none; ``token`` is the text at the node's position, for a logit its own; ``influence``
    is p·ΣÂᵏ; ``weight`` is p, the probability of an output that is a token, what was given for a direction;
    ``expanded`` says whether the node's incoming effects are in the graph, ``kept`` whether pruning left it.
    """
    kinds, positions = graph.kinds(), graph.positions()
    features, activations = np.full(graph.n_nodes, -1), np.full(graph.n_nodes, np.nan)
    features[: graph.first_error] = graph.features[:, 2]
    activations[: graph.first_error] = graph.activations
    weights, probabilities = (np.full(graph.n_nodes, np.nan) for _ in range(2))
    weights[graph.first_logit :] = graph.probabilities
    probabilities[graph.first_logit :] = np.where(graph.logits == NO_TOKEN, np.nan, graph.probabilities)
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
        "weight": weights,
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
    logits = zip(graph.logit_tokens, graph.logits == NO_TOKEN, graph.probabilities.tolist(), strict=True)
    return {
        "prompt": graph.prompt,
        "tokens": list(graph.tokens),
        "logits": [
            {"token": token, "weight" if direction else "probability": value}
            for token, direction, value in logits
        ],
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

"""Graphs of circuit-tracer (``.pt``, a pickle) as plain tensors, which ``resources/exchange/circuit_tracer_graph.py``
makes of them, and they of these, where circuit-tracer lives; no pickle is ever opened here.

A plain file is one safetensors file: ``adjacency_matrix`` (n, n) target by source, ``active_features`` (m, 3) layer,
position, feature, ``activation_values`` (m,), ``selected_features`` (n_f,) rows of these, ``input_tokens``,
``logit_token_ids``, ``logit_probabilities``; the metadata key ``circuit_tracer`` holds the rest as JSON: input_string,
logit_tokens, token_strings, vocab_size, scan, cfg. Nodes: selected features, errors of every layer and position
(layer-major), tokens, logits (circuit_tracer 0.5, graph.py). A number after the vocabulary stands for a direction.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from circuitflow.errors import UserError
from circuitflow.graphs.formats.viewer import layers_of, logit_numbers, vocabulary_of
from circuitflow.graphs.graph import NO_TOKEN, Graph
from circuitflow.provenance import canonical_json
from circuitflow.store.files import atomic_path

KEY = "circuit_tracer"
ARRAYS = (
    "adjacency_matrix", "active_features", "activation_values", "selected_features", "input_tokens",
    "logit_token_ids", "logit_probabilities",
)  # fmt: skip
SHAPE = {
    "n_layers": "num_hidden_layers n_layer",
    "d_model": "hidden_size n_embd",
    "n_heads": "num_attention_heads n_head",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size n_inner",
    "d_vocab": "vocab_size",
}
"""What its graphs say of a model, and the names that transformers gives it."""

UNKNOWN_BIAS = "not in files of circuit-tracer: NaN"


def read_circuit_tracer(path: Path) -> Graph:
    """A graph of circuit-tracer out of its plain form; rows of selected features and logits are its targets.

    Biases are not in its files (``bias`` is NaN).

    :raises UserError: the file is missing, damaged, or of another form (a .pt file is to be converted first).
    """
    said, arrays = _read(path)
    n_pos, n_layers = len(arrays["input_tokens"]), int(said["cfg"]["n_layers"])
    chosen = arrays["selected_features"].astype(np.int64)
    features = arrays["active_features"].astype(np.int64).reshape(-1, 3)[chosen]
    layer, position = np.divmod(np.arange(n_layers * n_pos), n_pos)
    logits = arrays["logit_token_ids"].astype(np.int64)
    adjacency = arrays["adjacency_matrix"].astype(np.float32)
    n_nodes = len(features) + n_layers * n_pos + n_pos + len(logits)
    if adjacency.shape != (n_nodes, n_nodes):
        raise UserError(
            f"Graph {path} has an adjacency matrix of {adjacency.shape}, expected {(n_nodes, n_nodes)} for its nodes; "
            "convert its .pt file again."
        )
    targets = np.concatenate([np.arange(len(features)), np.arange(n_nodes - len(logits), n_nodes)])
    size = int(said["vocab_size"])
    return Graph(
        prompt=str(said["input_string"]),
        tokens=tuple(map(str, said["token_strings"])),
        token_ids=arrays["input_tokens"].astype(np.int64),
        features=features,
        activations=_activations(arrays, chosen),
        errors=np.stack([layer, position], axis=1).astype(np.int64),
        logits=np.where(logits >= size, NO_TOKEN, logits),
        logit_tokens=tuple(map(str, said["logit_tokens"])),
        probabilities=arrays["logit_probabilities"].astype(np.float64),
        targets=targets,
        weights=np.ascontiguousarray(adjacency[targets]),
        bias=np.full(len(targets), np.nan),
        facts=_facts(said, size),
    )


def write_circuit_tracer(path: Path, graph: Graph, model: Path | None = None) -> None:
    """The plain form of a graph, of which their script makes a ``.pt`` file.

    Errors that the graph has no node for (nothing is left over there) get rows and columns of 0.

    :param model: folder with the model's config.json, or that file: what its graphs say of a model.
    :raises UserError: the graph does not know its prompt's token ids, or the model is not the graph's.
    """
    if (graph.token_ids < 0).any():
        raise UserError(
            f"The graph does not say which tokens stand at positions {np.flatnonzero(graph.token_ids < 0).tolist()}: "
            "a viewer's file need not show them all; convert the graph that the file was made of."
        )
    cfg = _cfg(graph, model)
    n_pos, n_layers = graph.n_pos, int(cfg["n_layers"])
    features = len(graph.features)
    n_nodes = features + n_layers * n_pos + n_pos + len(graph.logits)
    errors = features + graph.errors[:, 0] * n_pos + graph.errors[:, 1]
    rest = np.arange(features + n_layers * n_pos, n_nodes)
    place = np.concatenate([np.arange(features), errors, rest]).astype(np.int64)
    adjacency = np.zeros((n_nodes, n_nodes), dtype=np.float32)
    adjacency[np.ix_(place[graph.targets], place)] = graph.weights
    arrays: dict[str, np.ndarray] = {
        "adjacency_matrix": adjacency,
        "active_features": graph.features.astype(np.int64),
        "activation_values": graph.activations.astype(np.float32),
        "selected_features": np.arange(features, dtype=np.int64),
        "input_tokens": graph.token_ids.astype(np.int64),
        "logit_token_ids": np.array(logit_numbers(graph, cfg["d_vocab"]), dtype=np.int64),
        "logit_probabilities": graph.probabilities.astype(np.float32),
    }
    said = {
        "input_string": graph.prompt,
        "token_strings": list(graph.tokens),
        "logit_tokens": list(graph.logit_tokens),
        "vocab_size": int(cfg["d_vocab"]),
        "scan": graph.facts.get("scan"),
        "cfg": cfg,
    }
    with atomic_path(Path(path)) as temporary:
        save_file(arrays, temporary, metadata={KEY: canonical_json(said)})


def _activations(arrays: Mapping[str, np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """Values of the chosen features: of all that are active, as files have them, or of the chosen alone."""
    values = arrays["activation_values"].astype(np.float32)
    return values[chosen] if len(values) == len(arrays["active_features"]) else values


def _facts(said: Mapping[str, Any], size: int) -> dict[str, Any]:
    cfg = dict(said["cfg"])
    return {
        "model": cfg.get("model_name"),
        "scan": said.get("scan"),
        "n_layers": int(cfg["n_layers"]),
        "vocab_size": size,
        "circuit_tracer": cfg,
        "bias": UNKNOWN_BIAS,
    }


def _cfg(graph: Graph, model: Path | None) -> dict[str, Any]:
    """What circuit-tracer keeps of a model's configuration; what is not known is 0."""
    cfg: dict[str, Any] = dict(graph.facts.get("circuit_tracer") or {})
    if model is not None:
        cfg |= _shape_of(model)
    name = str(cfg.get("model_name") or graph.facts.get("model") or "unknown")
    cfg = {key: cfg.get(key, 0) for key in SHAPE} | {
        "model_name": name,
        "tokenizer_name": cfg.get("tokenizer_name", name),
        "original_architecture": cfg.get("original_architecture", "unknown"),
    }
    cfg["n_layers"] = int(cfg["n_layers"] or layers_of(graph))
    # Numbers of directions start at d_vocab.
    cfg["d_vocab"] = int(graph.facts.get("vocab_size") or cfg["d_vocab"] or vocabulary_of(graph))
    if cfg["n_layers"] < layers_of(graph):
        raise UserError(
            f"The graph has nodes of {layers_of(graph)} layers and the model has {cfg['n_layers']}; name the model of "
            "the graph."
        )
    if cfg["d_vocab"] <= (largest := int(graph.token_ids.max(initial=0))):
        raise UserError(
            f"The graph has a token of id {largest} and the model a vocabulary of {cfg['d_vocab']}; name the model of "
            "the graph."
        )
    return cfg


def _shape_of(model: Path) -> dict[str, Any]:
    path = model if model.is_file() else model / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"File {path} cannot be read ({error}); name a folder with the model's config.json (of a run's model that "
            "is results/MODEL/objects/OBJECT/hf, OBJECT as results/MODEL/model/manifest.json says)."
        ) from None
    found = {
        key: next((value[name] for name in names.split() if value.get(name) is not None), None)
        for key, names in SHAPE.items()
    }
    if found["d_head"] is None and found["d_model"] and found["n_heads"]:
        found["d_head"] = found["d_model"] // found["n_heads"]
    architectures = value.get("architectures") or [None]
    said = {**found, "original_architecture": architectures[0]}
    return {key: item for key, item in said.items() if item is not None}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.is_file():
        raise UserError(f"Graph {path} does not exist; check the path.")
    try:
        with safe_open(path, framework="np") as opened:
            said = json.loads((opened.metadata() or {}).get(KEY, "null"))
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError):
        said, arrays = None, {}
    if said is None or not set(ARRAYS) <= set(arrays):
        raise UserError(
            f"File {path} is no plain graph of circuit-tracer; where circuit-tracer is installed, run "
            "`python resources/exchange/circuit_tracer_graph.py to-plain GRAPH.pt PLAIN.safetensors`."
        )
    return said, arrays

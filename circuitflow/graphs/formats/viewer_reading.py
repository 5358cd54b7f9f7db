"""Reading a viewer's JSON (circuit-tracer, Neuronpedia, ours): the pruned graph that it shows, and its annotations."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.errors import UserError
from circuitflow.graphs.formats.viewer import OWN, TYPES, unpair
from circuitflow.graphs.graph import KINDS, NO_TOKEN, Graph
from circuitflow.graphs.influence import Kept, influence
from circuitflow.store.files import read_json

NAMED = re.compile(r"(\d+)_(\d+)_(\d+)")
TOKEN = re.compile(r"E_(\d+)_\d+")
OUTPUT = re.compile(r'Output "(.*)" \(p=.*\)', re.DOTALL)
UNKNOWN_BIAS = "not in files of viewers: NaN"


@dataclass(frozen=True)
class Viewed:
    """A graph out of a viewer's file. Only kept nodes and edges are there, so influence cannot be computed anew."""

    graph: Graph
    slug: str
    scan: str
    labels: dict[tuple[int, int], str]
    """What features were said to be, by (layer, feature)."""
    supernodes: dict[str, list[int]]
    """Node numbers by name; a name used twice gets a number."""
    pinned: list[int]
    kept: Kept
    """Nodes and edges of the file. Influence and shares are those of the file, or else of the pruned graph."""
    facts: dict[str, Any]
    """What a file of ours says besides: scores, sizes before pruning."""


def read_viewer(path: Path) -> Viewed:
    """Read a viewer's JSON.

    Rows of the graph hold the links of the file; biases and what was pruned are not there (``bias`` is NaN).

    :raises UserError: it is not such a file, two nodes have one name, or a link names a node that is not there.
    """
    value = _checked(path)
    nodes = _by_kind(path, value["nodes"])
    ordered = [node for kind in KINDS for node in nodes[kind]]
    numbers = _numbers(path, ordered)
    tokens = [str(token) for token in value["metadata"]["prompt_tokens"]]
    places = _tokens(path, nodes["token"], len(tokens))
    # Every position has a token node, also where the file shows none.
    first = len(nodes["feature"]) + len(nodes["error"])
    shift = len(tokens) - len(nodes["token"])
    numbers = {
        name: number if number < first else first + places[name] if name in places else number + shift
        for name, number in numbers.items()
    }
    graph = _graph(path, value, nodes, tokens, numbers)
    own = value["metadata"]
    supernodes, pinned = _annotations(value.get("qParams") or {}, numbers)
    labels = {
        (int(node["layer"]), _feature(path, node)): str(node["clerp"])
        for node in nodes["feature"]
        if node.get("clerp")
    }
    facts = own[OWN] if isinstance(own.get(OWN), dict) else {}
    slug, scan = str(own.get("slug", path.stem)), str(own.get("scan", ""))
    kept = _with_shares(whole(graph), value["links"], numbers)
    return Viewed(graph, slug, scan, labels, supernodes, pinned, kept, facts)


def whole(graph: Graph) -> Kept:
    """All nodes and edges of a graph, as pruning would give them if it took nothing away."""
    p = np.zeros(graph.n_nodes)
    p[graph.first_logit :] = graph.probabilities
    row, column = np.nonzero(graph.weights)
    weights = graph.weights[row, column]
    size = np.abs(graph.weights.astype(np.float64)).sum(axis=1)[row]
    return Kept(
        np.ones(graph.n_nodes, dtype=bool),
        np.stack([graph.targets[row], column], axis=1),
        weights,
        np.abs(weights) / np.maximum(size, 1e-10),
        influence(graph.weights, graph.targets, p),
    )


def _with_shares(kept: Kept, links: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> Kept:
    """Edges with the shares that the file gives, if it does."""
    given = {(numbers[x["target"]], numbers[x["source"]]): x.get("share") for x in links}
    shares = [given.get((down, up)) for down, up in kept.edges.tolist()]
    if any(share is None for share in shares):
        return kept
    return replace(kept, shares=np.array(shares, dtype=np.float64))


def _checked(path: Path) -> dict[str, Any]:
    value = read_json(path)
    parts = {"metadata": dict, "nodes": list, "links": list}
    for key, kind in parts.items():
        if not isinstance(value, dict) or not isinstance(value.get(key), kind):
            raise UserError(
                f"File {path} is no graph of a viewer: it has no {key}; name a JSON file that circuit-tracer, "
                "Neuronpedia or `circuitflow convert-graph` wrote."
            )
    if not isinstance(value["metadata"].get("prompt_tokens"), list):
        raise UserError(f"Graph {path} has no metadata.prompt_tokens; export it again.")
    return value


def _by_kind(path: Path, nodes: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Nodes by kind, errors by layer and position, tokens by position, the others as they stand."""
    kinds = {name: kind for kind, name in TYPES.items()}
    found: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in KINDS}
    for node in nodes:
        kind = kinds.get(str(node.get("feature_type")))
        if kind is None:
            raise UserError(
                f"Graph {path} has a node of type {node.get('feature_type')!r}; expected {', '.join(kinds)}."
            )
        found[kind].append(node)
    found["error"].sort(key=lambda node: (int(node["layer"]), int(node["ctx_idx"])))
    found["token"].sort(key=lambda node: int(node["ctx_idx"]))
    return found


def _numbers(path: Path, ordered: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for number, node in enumerate(ordered):
        name = str(node["node_id"])
        if numbers.setdefault(name, number) != number:
            raise UserError(
                f"Graph {path} has two nodes with the id {name}, so that its links cannot be told apart "
                "(circuit-tracer names an error of layer L like feature L of layer 0); convert its .pt file instead."
            )
    return numbers


def _tokens(path: Path, nodes: Sequence[Mapping[str, Any]], count: int) -> dict[str, int]:
    found = {str(node["node_id"]): int(node["ctx_idx"]) for node in nodes}
    if len(set(found.values())) != len(found) or any(not 0 <= at < count for at in found.values()):
        raise UserError(f"Graph {path} has token nodes that do not fit its {count} tokens; export it again.")
    return found


def _graph(
    path: Path,
    value: Mapping[str, Any],
    nodes: Mapping[str, Sequence[Mapping[str, Any]]],
    tokens: Sequence[str],
    numbers: Mapping[str, int],
) -> Graph:
    features = [(int(n["layer"]), int(n["ctx_idx"]), _feature(path, n)) for n in nodes["feature"]]
    errors = [(int(node["layer"]), int(node["ctx_idx"])) for node in nodes["error"]]
    activations = [node.get("activation") for node in nodes["feature"]]
    facts = _facts(value, nodes)
    size = facts.get("vocab_size")
    logits = [int(node["feature"]) for node in nodes["logit"]]
    n_nodes = len(features) + len(errors) + len(tokens) + len(logits)
    targets, weights = _weights(path, value["links"], numbers, n_nodes, n_nodes - len(logits))
    return Graph(
        prompt=str(value["metadata"].get("prompt", "".join(tokens))),
        tokens=tuple(tokens),
        token_ids=_token_ids(nodes["token"], len(tokens)),
        features=np.array(features, dtype=np.int64).reshape(-1, 3),
        activations=np.array([np.nan if a is None else a for a in activations], dtype=np.float32),
        errors=np.array(errors, dtype=np.int64).reshape(-1, 2),
        logits=np.array([NO_TOKEN if size and t >= size else t for t in logits], dtype=np.int64),
        logit_tokens=tuple(_output(node) for node in nodes["logit"]),
        probabilities=np.array([float(n.get("token_prob") or 0.0) for n in nodes["logit"]]),
        targets=targets,
        weights=weights,
        bias=np.full(len(targets), np.nan),
        facts=facts,
    )


def _facts(value: Mapping[str, Any], nodes: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What the file says of the run; the number of layers is that of ours, or what logits stand above."""
    own = value["metadata"].get(OWN)
    facts: dict[str, Any] = dict(own.get("facts", {})) if isinstance(own, Mapping) else {}
    if isinstance(own, Mapping) and "n_layers" in own:
        facts["n_layers"] = int(own["n_layers"])
    elif nodes["logit"]:
        facts["n_layers"] = int(nodes["logit"][0]["layer"]) - 1  # so circuit-tracer counts
    return facts | {"pruned": dict(value["metadata"].get("pruning_settings") or {}), "bias": UNKNOWN_BIAS}


def _weights(
    path: Path, links: Sequence[Mapping[str, Any]], numbers: Mapping[str, int], n_nodes: int, first_logit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all nodes that links lead to, and of the logits."""
    for link in links:
        for end in ("source", "target"):
            if link.get(end) not in numbers:
                raise UserError(
                    f"Graph {path} has a link with {end} {link.get(end)!r}, which is no node of it."
                )
    ends = np.array([(numbers[x["target"]], numbers[x["source"]]) for x in links], np.int64).reshape(-1, 2)
    targets = np.union1d(ends[:, 0], np.arange(first_logit, n_nodes))
    weights = np.zeros((len(targets), n_nodes), dtype=np.float32)
    rows = np.searchsorted(targets, ends[:, 0])
    weights[rows, ends[:, 1]] = [float(link["weight"]) for link in links]
    return targets, weights


def _token_ids(nodes: Sequence[Mapping[str, Any]], count: int) -> np.ndarray:
    """Token ids out of the names of token nodes; −1 where they do not tell."""
    ids = np.full(count, NO_TOKEN, dtype=np.int64)
    for node in nodes:
        found = TOKEN.fullmatch(str(node["node_id"]))
        if found:
            ids[int(node["ctx_idx"])] = int(found[1])
    return ids


def _feature(path: Path, node: Mapping[str, Any]) -> int:
    """The feature's number within its layer: in its name, or else behind the Cantor pairing."""
    layer = int(node["layer"])
    named = NAMED.fullmatch(str(node["node_id"]))
    if named and int(named[1]) == layer:
        return int(named[2])
    paired = unpair(int(node["feature"]))
    if paired[0] != layer:
        raise UserError(
            f"Graph {path} has a feature {node['node_id']!r} of number {node['feature']}, none of layer {layer}; "
            f"expected a name layer_feature_position, or the Cantor pairing of layer and feature."
        )
    return paired[1]


def _output(node: Mapping[str, Any]) -> str:
    found = OUTPUT.fullmatch(str(node.get("clerp", "")))
    return found[1] if found else str(node.get("clerp") or node["node_id"])


def _annotations(q: Mapping[str, Any], numbers: Mapping[str, int]) -> tuple[dict[str, list[int]], list[int]]:
    supernodes: dict[str, list[int]] = {}
    for name, *members in q.get("supernodes") or []:
        unique, count = str(name), 1
        while unique in supernodes:
            count += 1
            unique = f"{name} ({count})"
        supernodes[unique] = [numbers[member] for member in members if member in numbers]
    return supernodes, [numbers[name] for name in q.get("pinnedIds") or [] if name in numbers]

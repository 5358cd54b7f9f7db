"""Reading a viewer's JSON (circuit-tracer, Neuronpedia, ours): the pruned graph that it shows, and its annotations."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.errors import UserError
from circuitflow.graphs.formats.viewer import OWN, unpair
from circuitflow.graphs.formats.viewer_checks import Link, is_number, kind_of, link_of, read_checked
from circuitflow.graphs.graph import KINDS, NO_TOKEN, Graph
from circuitflow.graphs.influence import Kept, normalised, start, whole_influence

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
    """Nodes and edges of the file. Influence is that within the file; so are shares, unless the file has its own."""
    facts: dict[str, Any]
    """What a file of ours says besides: scores, sizes before pruning."""


def read_viewer(path: Path) -> Viewed:
    """Read a viewer's JSON.

    Rows of the graph hold the links of the file; biases and what was pruned are not there (``bias`` is NaN).

    :raises UserError: it is not such a file, a node or link is not as expected, or links go round in a circle.
    """
    value = read_checked(path)
    tokens = [str(token) for token in value["metadata"]["prompt_tokens"]]
    nodes = _by_kind(path, value["nodes"], len(tokens))
    ordered = [node for kind in KINDS for node in nodes[kind]]
    numbers = _numbers(path, ordered)
    places = _tokens(path, nodes["token"])
    # Every position has a token node, also where the file shows none.
    first = len(nodes["feature"]) + len(nodes["error"])
    shift = len(tokens) - len(nodes["token"])
    numbers = {
        name: number if number < first else first + places[name] if name in places else number + shift
        for name, number in numbers.items()
    }
    links = [link_of(path, number, link, numbers) for number, link in enumerate(value["links"])]
    graph = _graph(path, value, nodes, tokens, links)
    own = value["metadata"]
    supernodes, pinned = _annotations(path, value.get("qParams") or {}, numbers)
    labels = {
        (int(node["layer"]), _feature(path, node)): str(node["clerp"])
        for node in nodes["feature"]
        if node.get("clerp")
    }
    facts = own[OWN] if isinstance(own.get(OWN), dict) else {}
    slug, scan = str(own.get("slug", path.stem)), str(own.get("scan", ""))
    try:
        kept = _with_shares(whole(graph), links)
    except ValueError as error:
        raise UserError(
            f"Graph {path} has links that cannot be followed: {error}; export it again."
        ) from None
    return Viewed(graph, slug, scan, labels, supernodes, pinned, kept, facts)


def whole(graph: Graph) -> Kept:
    """All nodes and edges of a graph, as pruning would give them if it took nothing away."""
    p = start(graph)
    total = whole_influence(graph)
    row, column = np.nonzero(graph.weights)
    targets = graph.targets[row]
    return Kept(
        np.ones(graph.n_nodes, dtype=bool),
        np.stack([targets, column], axis=1),
        graph.weights[row, column],
        normalised(graph.weights)[row, column] * (total + p)[targets],
        total,
    )


def _with_shares(kept: Kept, links: Sequence[Link]) -> Kept:
    """Edges with the shares that the file gives, if it does."""
    given = {(link.target, link.source): link.share for link in links}
    shares = [given.get((down, up)) for down, up in kept.edges.tolist()]
    if any(share is None for share in shares):
        return kept
    return replace(kept, shares=np.array(shares, dtype=np.float64))


def _by_kind(path: Path, nodes: Sequence[Any], n_pos: int) -> dict[str, list[Mapping[str, Any]]]:
    """Nodes by kind, errors by layer and position, tokens by position, the others as they stand."""
    found: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in KINDS}
    for number, node in enumerate(nodes):
        found[kind_of(path, number, node, n_pos)].append(node)
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


def _tokens(path: Path, nodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Positions of token nodes by their names."""
    found = {str(node["node_id"]): int(node["ctx_idx"]) for node in nodes}
    if len(set(found.values())) != len(found):
        raise UserError(f"Graph {path} has two token nodes at one position; export it again.")
    return found


def _graph(
    path: Path,
    value: Mapping[str, Any],
    nodes: Mapping[str, Sequence[Mapping[str, Any]]],
    tokens: Sequence[str],
    links: Sequence[Link],
) -> Graph:
    features = [(int(n["layer"]), int(n["ctx_idx"]), _feature(path, n)) for n in nodes["feature"]]
    errors = [(int(node["layer"]), int(node["ctx_idx"])) for node in nodes["error"]]
    activations = [node.get("activation") for node in nodes["feature"]]
    facts = _facts(value, nodes)
    logits = nodes["logit"]
    n_nodes = len(features) + len(errors) + len(tokens) + len(logits)
    targets, weights = _weights(links, n_nodes, n_nodes - len(logits))
    return Graph(
        prompt=str(value["metadata"].get("prompt", "".join(tokens))),
        tokens=tuple(tokens),
        token_ids=_token_ids(nodes["token"], len(tokens)),
        features=np.array(features, dtype=np.int64).reshape(-1, 3),
        activations=np.array([np.nan if a is None else a for a in activations], dtype=np.float32),
        errors=np.array(errors, dtype=np.int64).reshape(-1, 2),
        logits=np.array([_logit(node, facts.get("vocab_size")) for node in logits], dtype=np.int64),
        logit_tokens=tuple(map(_output, logits)),
        probabilities=np.array(
            [float(node.get("weight") or node.get("token_prob") or 0.0) for node in logits]
        ),
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
        deepest = max(
            (int(node["layer"]) for kind in ("feature", "error") for node in nodes[kind]), default=-1
        )
        facts["n_layers"] = max(int(nodes["logit"][0]["layer"]) - 1, deepest + 1)  # so circuit-tracer counts
    return facts | {"pruned": _pruned(value["metadata"]), "bias": UNKNOWN_BIAS}


def _pruned(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Shares of influence that pruning kept, as far as they are told."""
    settings = metadata.get("pruning_settings")
    told: dict[str, Any] = {"node_threshold": metadata.get("node_threshold")}
    told |= settings if isinstance(settings, Mapping) else {}
    known = ("node_threshold", "edge_threshold")
    return {name: float(told[name]) for name in known if is_number(told.get(name))}


def _weights(links: Sequence[Link], n_nodes: int, first_logit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all nodes that links lead to, and of the logits."""
    ends = np.array([(link.target, link.source) for link in links], np.int64).reshape(-1, 2)
    targets = np.union1d(ends[:, 0], np.arange(first_logit, n_nodes))
    weights = np.zeros((len(targets), n_nodes), dtype=np.float32)
    rows = np.searchsorted(targets, ends[:, 0])
    weights[rows, ends[:, 1]] = [link.weight for link in links]
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


def _logit(node: Mapping[str, Any], vocabulary: int | None) -> int:
    """The token of an output; that of a direction has a weight of its own, or a number after the vocabulary."""
    token = int(node["feature"])
    beyond = vocabulary is not None and token >= vocabulary
    return NO_TOKEN if beyond or node.get("weight") is not None else token


def _output(node: Mapping[str, Any]) -> str:
    found = OUTPUT.fullmatch(str(node.get("clerp", "")))
    return found[1] if found else str(node.get("clerp") or node["node_id"])


def _annotations(path: Path, q: Any, numbers: Mapping[str, int]) -> tuple[dict[str, list[int]], list[int]]:
    """Supernodes and pinned nodes, as far as they are nodes of the file.

    :raises UserError: they are not lists.
    """
    groups, names = (
        q.get(key) or [] if isinstance(q, Mapping) else None for key in ("supernodes", "pinnedIds")
    )
    if not isinstance(names, list) or not isinstance(groups, list):
        raise UserError(
            f"Graph {path} has qParams without lists of supernodes and pinnedIds; export it again."
        )
    if any(not isinstance(group, list) or not group for group in groups):
        raise UserError(
            f"Graph {path} has a supernode that is no list of its name and nodes; export it again."
        )
    supernodes: dict[str, list[int]] = {}
    for name, *members in groups:
        unique, count = str(name), 1
        while unique in supernodes:
            count += 1
            unique = f"{name} ({count})"
        supernodes[unique] = [numbers[member] for member in map(str, members) if member in numbers]
    return supernodes, [numbers[name] for name in map(str, names) if name in numbers]

"""Circuits of feature-circuits (Marks et al. 2024): effects of every feature as tensors, without any pickle of theirs.

Their file is {examples, nodes {name: object with act (F,) and resc (1,)}, edges {upstream: {downstream: sparse}}}; an
edge's tensor has the shape (down, up), with the error at index F, and those into "y" have (up,). The objects are of a
class of theirs: ``resources/exchange/feature_circuits.py``, run where their code lives, makes of them the plain form
read here, with {"act", "resc"} in place of each object; nothing but tensors and plain values is ever unpickled here.

Names: embed, attn_L, mlp_L, resid_L. Signs are ours: their effects are gradients of logit(patch) − logit(clean) ×
(patched − clean). Only nodes summed over positions are exchanged.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node
from circuitflow.errors import UserError
from circuitflow.models.sites import depth_order, parse_site
from circuitflow.store.files import atomic_path

TO_METRIC = "y"
KINDS = ("attn", "mlp", "resid")
CONVENTIONS = {
    "metric": "m = wrong - right: negative when the model is right",
    "score": "effect of a node on m, mean over examples; > 0: its clean value supports the clean answer",
    "position": "null: summed over positions",
    "weight": "effect on m of the upstream node through the downstream one",
}


def read_feature_circuits(path: Path, node_threshold: float = 0.0, edge_threshold: float = 0.0) -> Circuit:
    """The nodes with |effect| above a threshold and the edges between them, as their figures show them.

    Edges into the metric are nodes' effects at the last site where the file gives none.

    :raises UserError: not there, their own pickle (to be converted first), another form, or a node per position.
    """
    value = _loaded(path)
    nodes, names = [], {}
    for name, parts in value["nodes"].items():
        if name == TO_METRIC:
            continue
        if not isinstance(name, str):
            raise UserError(
                f"Circuit {path} names a place {name!r}; embed, attn_L, mlp_L and resid_L are known."
            )
        site, act, resc = site_of(name, path), *(_flat(parts, part, path) for part in ("act", "resc"))
        names[name] = (site, len(act))
        if len(resc) != 1:
            raise UserError(
                f"Circuit {path} has {len(resc)} numbers as resc of {name}; the error has one effect."
            )
        scores = torch.cat([act, resc]).double()
        strong = (scores.abs() > node_threshold).nonzero()[:, 0].tolist()
        nodes += [_node(site, index, len(act), float(scores[index])) for index in strong]
    sites = sorted({site for site, _ in names.values()}, key=lambda site: depth_order(parse_site(site)))
    inside = {node.id for node in nodes}
    edges = [
        edge
        for up, downs in value["edges"].items()
        for down, weights in downs.items()
        for edge in _edges(names, up, down, weights, edge_threshold, path)
        if edge.up in inside and (edge.down == METRIC or edge.down in inside)
    ]
    nodes.sort(key=lambda node: (depth_order(parse_site(node.site)), -abs(node.score), node.feature))
    edges.sort(key=lambda edge: (-abs(edge.weight), edge.up, edge.down))
    widths = dict(names.values())
    selection = {
        "nodes": {"threshold": node_threshold},
        "edges": {"threshold": edge_threshold},
        "d_dict": widths,
    }
    return Circuit(
        tuple(sites), tuple(nodes), tuple(edges), selection, CONVENTIONS, {"format": "feature-circuits"}
    )


def write_feature_circuits(path: Path, circuit: Circuit, d_dict: Mapping[str, int] | None = None) -> None:
    """The plain form of a circuit; their converter makes their own of it. Nodes and edges left out are 0.

    :param d_dict: features by site; by default as ``selection["d_dict"]`` says.
    :raises UserError: a node has a position, a site is none of theirs, or its number of features is not known.
    """
    widths = dict(d_dict or circuit.selection.get("d_dict") or {})
    for site in circuit.sites:
        if site not in widths:
            raise UserError(
                f"How many features {site} has is not known, and their tensors have all of them; name its dictionary."
            )
    nodes: dict[str, Any] = {}
    place: dict[str, tuple[str, int]] = {}
    for site in circuit.sites:
        scores = torch.zeros(widths[site] + 1, dtype=torch.float64)
        for node in circuit.at(site):
            if node.position is not None:
                raise UserError(
                    f"Node {node.id} has a position; feature-circuits files are exchanged summed over positions."
                )
            index = widths[site] if node.kind == "error" else node.feature
            if index > widths[site] or (node.kind == "feature" and index == widths[site]):
                raise UserError(
                    f"Node {node.id} does not exist in a dictionary of {widths[site]} features; name the dictionaries "
                    "that the circuit was made with."
                )
            scores[index] = node.score
            place[node.id] = (name_of(site), index)
        nodes[name_of(site)] = {"act": scores[:-1].clone(), "resc": scores[-1:].clone()}
    edges: dict[str, dict[str, dict[tuple[int, ...], float]]] = {}
    for edge in circuit.edges:
        up, index = place[edge.up]
        down, into = (TO_METRIC, 0) if edge.down == METRIC else place[edge.down]
        at = (index,) if edge.down == METRIC else (into, index)
        edges.setdefault(up, {}).setdefault(down, {})[at] = edge.weight
    size = {name_of(site): width + 1 for site, width in widths.items()}
    stacked = {
        up: {
            down: _sparse(found, (size[up],) if down == TO_METRIC else (size[down], size[up]))
            for down, found in downs.items()
        }
        for up, downs in edges.items()
    }
    with atomic_path(path) as temporary:
        torch.save({"examples": [], "nodes": nodes, "edges": stacked}, temporary)


def site_of(name: str, path: Path | str = "") -> str:
    """Our name of one of their sites.

    :raises UserError: it is none.
    """
    kind, _, layer = name.partition("_")
    if name == "embed":
        return name
    if kind not in KINDS or not layer.isdecimal():
        raise UserError(f"Circuit {path} names a place '{name}'; embed, attn_L, mlp_L and resid_L are known.")
    return f"{kind}.{int(layer)}"


def name_of(site: str) -> str:
    """Their name of one of our sites.

    :raises UserError: they have none.
    """
    parsed = parse_site(site)
    if parsed.kind != "embed" and parsed.kind not in KINDS:
        raise UserError(
            f"Site {site} has no name in feature-circuits, which knows embed, attn, mlp and resid."
        )
    return site.replace(".", "_")


def _loaded(path: Path) -> dict[str, Any]:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"Circuit {path} does not exist; name the file.") from None
    except IsADirectoryError:
        raise UserError(f"Circuit {path} is a folder; name the file.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise UserError(
            f"Circuit {path} holds more than plain tensors, which is not loaded here; convert it where "
            f"feature-circuits "
            "lives with `python resources/exchange/feature_circuits.py to-plain FILE PLAIN`."
        ) from None
    if not isinstance(value, dict) or not isinstance(value.get("nodes"), dict) or "edges" not in value:
        raise UserError(f"File {path} is no circuit of feature-circuits: it needs nodes and edges.")
    edges = value["edges"]
    if not isinstance(edges, dict) or not all(isinstance(downs, dict) for downs in edges.values()):
        raise UserError(
            f"Circuit {path} has edges that are not {{upstream: {{downstream: tensor}}}}; make it anew."
        )
    return value


def _flat(parts: Any, name: str, path: Path) -> Tensor:
    """One row of effects; several would be one per position or example."""
    if not isinstance(parts, Mapping) or not isinstance(parts.get(name), Tensor):
        raise UserError(f"Circuit {path} has a node without '{name}'; it needs act and resc.")
    tensor = parts[name]
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    if not tensor.ndim:
        raise UserError(f"Circuit {path} has a single number as '{name}'; it takes one effect per feature.")
    _check_finite(tensor, f"effects ('{name}')", path)
    if tensor.numel() != tensor.shape[-1] and tensor.ndim > 1:
        raise UserError(
            f"Circuit {path} has effects of shape {tuple(tensor.shape)}: one per position or example; make it with "
            "aggregation sum."
        )
    return tensor.reshape(-1)


def _check_finite(values: Tensor, what: str, path: Path) -> None:
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            f"Circuit {path} has {what} that are not numbers (nan or inf); make it anew without them."
        )


def _node(site: str, index: int, width: int, score: float) -> Node:
    return Node(site, "error", -1, score) if index == width else Node(site, "feature", index, score)


def _edges(
    names: Mapping[str, tuple[str, int]],
    up: str,
    down: str,
    weights: Any,
    threshold: float,
    path: Path,
) -> Sequence[Edge]:
    if up not in names or (down != TO_METRIC and down not in names):
        raise UserError(f"Circuit {path} has edges {up} -> {down} between places without nodes.")
    (site, width), end = names[up], None if down == TO_METRIC else names[down]
    wanted = (width + 1,) if end is None else (end[1] + 1, width + 1)
    tensor = weights if isinstance(weights, Tensor) else torch.empty(0)
    if tuple(tensor.shape) != wanted:
        raise UserError(
            f"Circuit {path} has edges {up} -> {down} of shape {tuple(tensor.shape)} in place of {wanted}; make it "
            f"with "
            "aggregation sum."
        )
    sparse = (tensor if tensor.is_sparse else tensor.to_sparse()).coalesce()
    _check_finite(sparse.values(), f"edges {up} -> {down}", path)
    found = []
    for at, value in zip(sparse.indices().T.tolist(), sparse.values().double().tolist(), strict=True):
        if abs(value) > threshold:
            target = METRIC if end is None else _node(end[0], at[0], end[1], 0.0).id
            found.append(Edge(_node(site, at[-1], width, 0.0).id, target, value))
    return found


def _sparse(entries: Mapping[tuple[int, ...], float], shape: tuple[int, ...]) -> Tensor:
    indices = torch.tensor(list(entries)).reshape(len(entries), len(shape)).T
    values = torch.tensor(list(entries.values()), dtype=torch.float64)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()

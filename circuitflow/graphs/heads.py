"""Stage ``attribute_heads``: the share of each edge of an attribution graph that each attention head carries."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from circuitflow.dictionaries.family import load_family
from circuitflow.graphs.directions import parts_of
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.head_paths import Enter, Read, Split, feature_read, logit_read, split
from circuitflow.graphs.influence import prune
from circuitflow.graphs.sources import Sources
from circuitflow.jobs import Output, progress
from circuitflow.models.frozen import FrozenPrompt
from circuitflow.models.loading import load_model
from circuitflow.models.sites import layer_of
from circuitflow.progress import logger
from circuitflow.store.tables import write_table

DIRECT = -1
"""Layer and head of the rows that tell of paths without any head."""
SOURCES_AT_ONCE = 64

CONVENTIONS = {
    "through": "part of the edge's effect along all paths that use the head; the heads of one layer and the paths past "
    "that layer's attention sum to the edge",
    "last": "part along paths whose last head, the one nearest to the target, is this; all heads and the direct part "
    "(layer and head -1: no head at all) sum to the edge",
    "flow": "share of the graph's influence that the edge carries",
}
COLUMNS = (
    "source", "target", "source_kind", "target_kind", "source_layer", "target_layer", "source_position",
    "target_position", "weight", "flow", "layer", "head", "through", "last",
)  # fmt: skip


def attribute_heads(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. Split the strongest edges of a pruned graph by attention head.

    Inputs ``model``, ``graph``, ``dictionaries`` (list); params ``edges`` (how many), ``batch`` (targets at once),
    ``node_share`` and ``edge_share`` (of pruning), ``dtype``, ``compute``.

    Output ``heads``: source, target (ids of nodes), source_kind, target_kind, source_layer, target_layer,
    source_position, target_position, weight (of the edge), flow, layer, head, through, last (in units of the weight);
    one row per edge and head of the layers between, and one (layer and head −1) with the direct part as ``last``.
    Edges into directions that were given as rows, not as combinations of tokens, are left out.
    """
    device = params["compute"]["device"]
    lm = load_model(Path(inputs["model"]), params["dtype"], device)
    graph = Graph.load(Path(inputs["graph"]))
    with torch.no_grad():
        frozen = FrozenPrompt.of(lm, torch.from_numpy(graph.token_ids))
        family = load_family([Path(path) for path in inputs["dictionaries"]])
        sources = Sources.of(frozen, family.to(frozen.dtype).to(frozen.embed.device))
        edges, flow = strongest(graph, params["edges"], params["node_share"], params["edge_share"])
        found = by_head(sources, graph, edges, params["batch"])
    facts = {**out.provenance, "conventions": CONVENTIONS, "prompt": graph.prompt, "edges": len(edges)}
    facts |= {"n_layers": frozen.n_layers, "heads": frozen.layers[0].heads}
    facts |= {"tokens": list(graph.tokens), "logit_tokens": list(graph.logit_tokens)}
    write_table(out.files["heads"], table(graph, edges, flow, found), facts)


def strongest(graph: Graph, most: int, node_share: float, edge_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges (n, 2: target, source) of the pruned graph with the most influence along them, and their share of it."""
    kept = prune(graph, node_share, edge_share)
    rows_alone = [graph.first_logit + rank for rank, parts in enumerate(parts_of(graph)) if not parts]
    known = ~np.isin(kept.edges[:, 0], rows_alone)
    if not known.all():
        logger.info("%d edges into directions are left out: their tokens are not known", (~known).sum())
    edges, shares = kept.edges[known], kept.shares[known]
    order = np.argsort(-shares, kind="stable")[:most]
    return edges[order], shares[order] / max(float(kept.shares.sum()), 1e-30)


def by_head(sources: Sources, graph: Graph, edges: np.ndarray, batch: int) -> list[Split]:
    """The split of every edge, one after the other: a :class:`Split` of one target and one source each."""
    targets, sources_of = np.unique(edges[:, 0]), np.unique(edges[:, 1])
    reads = {int(node): read_of(sources, graph, int(node)) for node in targets}
    enters = {int(node): enter_of(sources, graph, int(node)) for node in sources_of}
    found: dict[tuple[int, int], Split] = {}
    for start in range(0, len(sources_of), SOURCES_AT_ONCE):
        some = sources_of[start : start + SOURCES_AT_ONCE].tolist()
        mine = edges[np.isin(edges[:, 1], some)]
        wanted = np.unique(mine[:, 0]).tolist()
        for first in range(0, len(wanted), batch):
            these = wanted[first : first + batch]
            parts = split(sources, [reads[node] for node in these], [enters[node] for node in some])
            for target, source in mine[np.isin(mine[:, 0], these)].tolist():
                found[target, source] = _one(parts, these.index(target), some.index(source))
            progress("edges split by head", len(found), len(edges))
    return [found[target, source] for target, source in edges.tolist()]


def _one(parts: Split, target: int, source: int) -> Split:
    at = slice(target, target + 1), slice(source, source + 1)
    return Split(*(part[at].clone() for part in (parts.total, parts.direct, parts.through, parts.last)))


def read_of(sources: Sources, graph: Graph, node: int) -> Read:
    """A feature or logit of the graph as a target."""
    if node >= graph.first_logit:
        return logit_read(sources.frozen, parts_of(graph)[node - graph.first_logit])
    layer, position, feature = map(int, graph.features[node])
    weights = sources.family.members[sources.layers.index(layer)].W_enc
    assert weights is not None
    return feature_read(sources.frozen, layer, position, weights[feature])


def enter_of(sources: Sources, graph: Graph, node: int) -> Enter:
    """A feature, error or token of the graph as what it adds to the stream."""
    if node >= graph.first_token:
        position = node - graph.first_token
        return Enter(position, {-1: sources.frozen.embed[position]})
    if node >= graph.first_error:
        layer, position = map(int, graph.errors[node - graph.first_error])
        return Enter(position, {layer: sources.errors[layer, position]})
    layer, position, feature = map(int, graph.features[node])
    member = sources.layers.index(layer)
    activation = float(graph.activations[node])
    return Enter(
        position,
        {
            layer_of(site): activation * sources.family.decoder(member, site)[feature]
            for site in sources.family.members[member].writes
        },
    )


def table(
    graph: Graph, edges: np.ndarray, flow: np.ndarray, found: Sequence[Split]
) -> dict[str, np.ndarray | list[Any]]:
    """The rows of all edges."""
    names, layers, positions = graph.node_ids(), graph.layers(), graph.positions()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    weight = {int(node): row for row, node in enumerate(graph.targets)}
    for (target, source), share, one in zip(edges.tolist(), flow.tolist(), found, strict=True):
        through, last = (part[0, 0].double().cpu().numpy() for part in (one.through, one.last))
        used = (through != 0) | (last != 0)
        layer, head = np.nonzero(used)
        n = len(layer) + 1
        row = {
            "layer": np.append(DIRECT, layer),
            "head": np.append(DIRECT, head),
            "through": np.append(np.nan, through[used]),
            "last": np.append(float(one.direct), last[used]),
        }
        same: dict[str, Any] = {"weight": float(graph.weights[weight[target], source]), "flow": share}
        for end, node in (("source", source), ("target", target)):
            same |= {end: names[node], f"{end}_kind": graph.kind(node)}
            same |= {f"{end}_layer": int(layers[node]), f"{end}_position": int(positions[node])}
        kinds = {str: object, int: np.int64, float: np.float64}
        row |= {name: np.full(n, value, dtype=kinds[type(value)]) for name, value in same.items()}
        for name in COLUMNS:
            parts[name].append(row[name])
    return {name: np.concatenate(columns) if columns else [] for name, columns in parts.items()}

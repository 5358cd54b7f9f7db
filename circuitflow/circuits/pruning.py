"""Taking nodes and edges out of a circuit that lie on no path."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from circuitflow.attribution.nodes import strength
from circuitflow.attribution.paths import possible_neighbours
from circuitflow.circuits.circuit import METRIC, Edge, Node
from circuitflow.errors import UserError, nearest

Pruning = Literal["none", "source_to_sink", "sink_backwards"]
RULES: tuple[Pruning, ...] = ("none", "source_to_sink", "sink_backwards")


@dataclass(frozen=True)
class Pruned:
    """What is left of a circuit, in the order given, and the ids of what is not."""

    nodes: list[Node]
    edges: list[Edge]
    off_path: list[str]
    """Nodes on no path of the kind asked for."""
    over_cap: list[str]
    """Nodes on such a path, but too weak for ``max_nodes``."""


def pruned(
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    rule: str,
    sites: Sequence[str],
    max_nodes: int | None = None,
    ranking: str = "absolute",
    upstream: Mapping[str, Sequence[str]] | None = None,
) -> Pruned:
    """Keep the nodes, and the edges between them, that lie on a path.

    - ``none``: all of them;
    - ``sink_backwards``: those from which edges lead to the metric;
    - ``source_to_sink``: those on a way from a source node to the metric. Every node of a source site is a source:
      a site that has nodes while nothing upstream of it has any (:func:`source_sites`).

    With ``max_nodes`` the strongest of what is left are kept and the rule is applied once more, so that the result may
    be smaller than the cap. Equal strengths go by the order given.

    :param upstream: for each site, the sites that reach it without passing another (``paths.neighbours``); by default
        those of sequential blocks.
    :raises UserError: an unknown rule.
    """
    if rule not in RULES:
        raise UserError(f"circuit.prune '{rule}' is unknown: {nearest(rule, RULES)}.")
    before = possible_neighbours(sites) if upstream is None else upstream
    kept = _on_path(nodes, edges, rule, before)
    over_cap: list[str] = []
    if max_nodes is not None and len(kept) > max_nodes:
        falling = np.argsort(-strength(np.array([node.score for node in kept]), ranking), kind="stable")
        over_cap = [kept[i].id for i in falling[max_nodes:]]
        lost = set(over_cap)
        kept = _on_path([node for node in kept if node.id not in lost], edges, rule, before)
    known = {node.id for node in kept}
    gone = known | set(over_cap)
    return Pruned(
        nodes=kept,
        edges=[edge for edge in edges if edge.up in known and (edge.down in known or edge.down == METRIC)],
        off_path=[node.id for node in nodes if node.id not in gone],
        over_cap=over_cap,
    )


def source_sites(nodes: Iterable[Node], upstream: Mapping[str, Sequence[str]]) -> set[str]:
    """Sites that have nodes while no site upstream of them, however far, has any.

    The first site with nodes is always among them. Others are where blocks are parallel (attention and MLP of one layer
    without nodes before) or where the run lists nothing that they read.
    """
    present = {node.site for node in nodes}
    return {site for site in present if not present & _before(site, upstream)}


def _before(site: str, upstream: Mapping[str, Sequence[str]]) -> set[str]:
    return _reached(upstream.get(site, ()), upstream)


def _on_path(
    nodes: Sequence[Node], edges: Sequence[Edge], rule: str, upstream: Mapping[str, Sequence[str]]
) -> list[Node]:
    """Nodes that the rule keeps; edges count where both ends are among the nodes."""
    if rule == "none":
        return list(nodes)
    known = {node.id for node in nodes} | {METRIC}
    backwards: dict[str, list[str]] = {}
    forwards: dict[str, list[str]] = {}
    for edge in edges:
        if edge.up in known and edge.down in known:
            backwards.setdefault(edge.down, []).append(edge.up)
            forwards.setdefault(edge.up, []).append(edge.down)
    kept = _reached([METRIC], backwards)
    if rule == "source_to_sink":
        first = source_sites(nodes, upstream)
        kept &= _reached([node.id for node in nodes if node.site in first], forwards)
    return [node for node in nodes if node.id in kept]


def _reached(starts: Iterable[str], steps: Mapping[str, Sequence[str]]) -> set[str]:
    """Everything that steps lead to, the starts included."""
    found, waiting = set(starts), list(starts)
    while waiting:
        fresh = [name for name in steps.get(waiting.pop(), ()) if name not in found]
        found.update(fresh)
        waiting.extend(fresh)
    return found

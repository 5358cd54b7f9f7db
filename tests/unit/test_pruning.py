"""Pruning small graphs of embeddings, attention, MLPs and residual sites."""

import pytest

from circuitflow.attribution.paths import Blocks, neighbours
from circuitflow.circuits.circuit import METRIC, Edge, Node
from circuitflow.circuits.pruning import pruned, source_sites
from circuitflow.errors import UserError

SITES = ("embed", "attn.0", "mlp.0", "resid.0")


def node(site: str, feature: int, score: float = 1.0) -> Node:
    return Node(site, "error" if feature < 0 else "feature", feature, score)


E1, E2 = node("embed", 1, 5.0), node("embed", 2, -4.0)
A1, M1, M2 = node("attn.0", 1, 3.0), node("mlp.0", 1, 2.0), node("mlp.0", 2, 0.5)
R1, R2 = node("resid.0", 1, 1.5), node("resid.0", -1, -1.0)
NODES = [E1, E2, A1, M1, M2, R1, R2]


def edges(*pairs) -> list[Edge]:
    return [Edge(up.id, METRIC if down is None else down.id, 1.0) for up, down in pairs]


# E2 is a dead end, M2 comes from nowhere, R2 has no way on
EDGES = edges((E1, A1), (A1, M1), (M1, R1), (R1, None), (E2, R2), (M2, R1))


def ids(nodes) -> list[str]:
    return [one.id for one in nodes]


def test_without_a_rule_everything_stays():
    found = pruned(NODES, EDGES, "none", SITES)
    assert (found.nodes, found.edges, found.off_path, found.over_cap) == (NODES, EDGES, [], [])


def test_backwards_from_the_metric():
    found = pruned(NODES, EDGES, "sink_backwards", SITES)
    assert found.nodes == [E1, A1, M1, M2, R1]
    assert found.off_path == ids([E2, R2])
    assert found.edges == [edge for edge in EDGES if edge.up != E2.id]


def test_from_sources_to_the_metric():
    found = pruned(NODES, EDGES, "source_to_sink", SITES)
    assert found.nodes == [E1, A1, M1, R1]
    assert found.off_path == ids([E2, M2, R2])
    assert found.edges == EDGES[:4]


def test_edges_to_nodes_that_are_not_there_make_no_path():
    assert pruned([E1, R1], EDGES, "sink_backwards", SITES).nodes == [R1]
    assert pruned([E1, R1], EDGES, "none", SITES).edges == edges((R1, None))


def test_sources_are_sites_with_nothing_upstream_that_has_nodes():
    sequential, parallel = (neighbours(SITES, Blocks(1, parallel)) for parallel in (False, True))
    assert source_sites(NODES, sequential) == source_sites(NODES, parallel) == {"embed"}
    without = [A1, M1, R1]
    assert source_sites(without, sequential) == {"attn.0"}
    assert source_sites(without, parallel) == {"attn.0", "mlp.0"}
    # far upstream counts: between embed and resid.0 no node is left
    assert source_sites([E1, R1], sequential) == {"embed"}
    cut = edges((M1, R1), (R1, None))
    assert pruned(without, cut, "source_to_sink", SITES, upstream=sequential).nodes == []
    assert pruned(without, cut, "source_to_sink", SITES, upstream=parallel).nodes == [M1, R1]


def test_the_cap_keeps_the_strongest_and_prunes_again():
    strongest = pruned(NODES, EDGES, "none", SITES, max_nodes=3)
    assert strongest.nodes == [E1, E2, A1]
    assert strongest.over_cap == ids([M1, R1, R2, M2])
    assert strongest.edges == EDGES[:1]
    # five nodes are on paths; without the two weakest (M2, R1) no path is left
    again = pruned(NODES, EDGES, "sink_backwards", SITES, max_nodes=3)
    assert again.nodes == []
    assert again.over_cap == ids([R1, M2])
    assert again.off_path == ids([E1, E2, A1, M1, R2])
    assert pruned(NODES, EDGES, "sink_backwards", SITES, max_nodes=4).nodes == [E1, A1, M1, R1]


def test_the_cap_follows_the_ranking():
    assert pruned(NODES, [], "none", SITES, max_nodes=2).nodes == [E1, E2]
    assert pruned(NODES, [], "none", SITES, max_nodes=2, ranking="signed").nodes == [E1, A1]


def test_an_empty_circuit_and_an_unknown_rule():
    assert pruned([], [], "source_to_sink", SITES, max_nodes=1).nodes == []
    with pytest.raises(UserError, match="did you mean 'sink_backwards'"):
        pruned(NODES, EDGES, "sink_backward", SITES)

"""Supernodes of attribution graphs: similarities, groups, and the graph between them."""

import numpy as np
import pytest
import torch

from circuitflow.errors import UserError
from circuitflow.graphs.building import Settings, build_graph
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.grouping import (
    Activity,
    Nodes,
    Virtual,
    combined,
    groups,
    virtual_similarity,
    virtual_weights,
)
from circuitflow.graphs.influence import prune
from circuitflow.graphs.likeness import Likeness
from circuitflow.graphs.naming import Named, expanded, nodes_named, parse_feature
from circuitflow.graphs.sources import Sources
from circuitflow.graphs.supernodes import chosen_by_hand, edge_table, found_groups, node_table
from circuitflow.models.frozen import FrozenPrompt
from tests.fixtures.graph_examples import random_family


@pytest.fixture
def graph():
    """Two tokens, features 0_4 (both positions), 1_5 and 1_6 (last position), one error, one logit."""
    #           0_4_0  0_4_1  1_5_1  1_6_1  E_0_0  T_0  T_1  L_0
    weights = np.array(
        [
            [0, 0, 0, 0, 0, 1.0, 0, 0],  # 0_4_0
            [0, 0, 0, 0, 0, 0, 2.0, 0],  # 0_4_1
            [1, 3, 0, 0, 0, 0, 0, 0],  # 1_5_1
            [0, -1, 0, 0, 3, 0, 0, 0],  # 1_6_1
            [0, 0, 2, 6, 0, 0, 0, 0],  # L_0
        ]
    )
    return Graph(
        prompt="a b",
        tokens=("a", "b"),
        token_ids=np.array([3, 4]),
        features=np.array([[0, 0, 4], [0, 1, 4], [1, 1, 5], [1, 1, 6]]),
        activations=np.array([1.0, 2.0, 4.0, 2.0]),
        errors=np.array([[0, 0]]),
        logits=np.array([7]),
        logit_tokens=("x",),
        probabilities=np.array([1.0]),
        targets=np.array([0, 1, 2, 3, 7]),
        weights=weights,
        bias=np.zeros(5),
        facts={"n_layers": 2},
    )


def _likeness(nodes, place, similarity):
    square = np.array(similarity, dtype=np.float64)
    activity = Activity(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]], np.float32), np.array([8, 9, 8]))
    return Likeness(np.array(nodes), np.array(place), square, square, square, activity, None)


def test_ids_of_features(graph):
    assert parse_feature("3_1021_5") == Named(3, 1021, 5)
    assert str(parse_feature("3_1021")) == "3_1021"
    assert nodes_named(["0_4", "1_6_1", "0_4_1", "9_9"], graph) == [0, 1, 3]
    assert expanded(["both", "1_6_1"], {"both": ["0_4_0", "0_4_1"]}) == [
        Named(0, 4, 0), Named(0, 4, 1), Named(1, 6, 1),
    ]  # fmt: skip
    for wrong in ("E_0_1", "3-4-5", "capital"):
        with pytest.raises(UserError, match="3_1021_5"):
            parse_feature(wrong)
    with pytest.raises(UserError, match="there are: both"):
        expanded(["other"], {"both": ["0_4_0"]})


def test_supernodes_by_hand(graph):
    assert chosen_by_hand(graph, {"first": ["0_4"], "gone": ["5_5_5"]}) == {"first": [0, 1]}
    with pytest.raises(UserError, match="'first' and 'second'"):
        chosen_by_hand(graph, {"first": ["0_4"], "second": ["0_4_1"]})


def test_effects_between_supernodes_are_sums(graph):
    kept = prune(graph, 1.0, 1.0)
    columns = edge_table(graph, kept, {"first": [0, 1], "second": [2, 3]})
    rows = {
        (source, target): (weight, absolute, count)
        for source, target, weight, absolute, count in zip(
            *(columns[name] for name in ("source", "target", "weight", "absolute", "edges")), strict=True
        )
    }
    assert rows == {
        ("first", "second"): (1 + 3 - 1, 1 + 3 + 1, 3),
        ("errors_0", "second"): (3, 3, 1),
        ("second", "L_0"): (8, 8, 2),
        ("T_0", "first"): (1, 1, 1),
        ("T_1", "first"): (2, 2, 1),
    }
    assert sum(columns["flow"]) == pytest.approx(1)
    # Into the logit goes 1; of it, ¼ comes from 1_5 and ¾ from 1_6, and all of it goes one step further back.
    at = list(zip(columns["source"], columns["target"], strict=True)).index(("first", "second"))
    influence = (1 / 4) * 1 + (3 / 4) * (1 / 4)
    whole = 1 + (1 / 4 + 3 / 4) + influence
    assert columns["flow"][at] == pytest.approx(influence / whole)


def test_edges_within_a_supernode_are_left_out(graph):
    columns = edge_table(graph, prune(graph, 1.0, 1.0), {"all": [0, 1, 2, 3]})
    assert set(zip(columns["source"], columns["target"], strict=True)) == {
        ("T_0", "all"), ("T_1", "all"), ("errors_0", "all"), ("all", "L_0"),
    }  # fmt: skip


def test_the_table_of_nodes(graph):
    kept = prune(graph, 1.0, 1.0)
    alike = _likeness([0, 1, 2, 3], [0, 0, 1, 1], [[1, 0.25], [0.25, 1]])
    columns = node_table(graph, kept, {"first": [0, 2]}, {"first": "by hand"}, {"first": "'a'"}, alike)
    rows = {node: place for place, node in enumerate(columns["node"])}
    assert columns["supernode"][rows["0_4_0"]] == "first"
    assert columns["similarity"][rows["1_5_1"]] == 0.25
    assert columns["supernode_kind"][rows["1_6_1"]] == "single"
    assert np.isnan(columns["similarity"][rows["1_6_1"]])
    assert columns["supernode"][rows["E_0_0"]] == "errors_0"
    assert columns["supernode_kind"][rows["E_0_0"]] == "errors"
    assert columns["influence"][rows["1_6_1"]] == pytest.approx(0.75)


def test_groups_found_by_similarity(graph):
    kept = prune(graph, 1.0, 1.0)
    params = {"similarity": 0.5, "positions": "any", "max_layers": None}
    alike = _likeness([0, 1, 2, 3], [0, 0, 1, 1], [[1, 0.25], [0.25, 1]])
    free = np.arange(4)
    # Both 0_4 are one feature; 1_5 and 1_6 have one row here, so that they are alike; they have more influence.
    assert list(found_groups(graph, kept, free, alike, params).values()) == [[2, 3], [0, 1]]
    same = found_groups(graph, kept, free, alike, params | {"positions": "same"})
    assert list(same.values()) == [[2, 3]]
    everything = found_groups(graph, kept, free, alike, params | {"similarity": 0.2})
    assert list(everything.values()) == [[0, 1, 2, 3]]
    one_layer = found_groups(graph, kept, free, alike, params | {"similarity": 0.2, "max_layers": 1})
    assert sorted(one_layer.values()) == [[0, 1], [2, 3]]


def test_average_linkage_by_hand():
    similarity = np.array([[1, 0.9, 0.6], [0.9, 1, 0.3], [0.6, 0.3, 1]])
    nodes = Nodes(np.zeros(3, np.int64), np.zeros(3, np.int64))
    # The third is .45 alike to the first two on average.
    assert len(set(groups(similarity, nodes, 0.46, "any", None))) == 2
    assert len(set(groups(similarity, nodes, 0.44, "any", None))) == 1
    assert len(set(groups(similarity, nodes, 0.95, "any", None))) == 3
    assert groups(similarity[:1, :1], nodes, 0.5, "any", None).tolist() == [0]


def test_virtual_similarity_by_hand():
    # Two features of layer 1 and one of layer 0 that gives them 1 and 3; one token, one logit.
    virtual = Virtual(
        layers=np.array([0, 1, 1]),
        between=np.array([[0, 0, 0], [1.0, 0, 0], [3.0, 0, 0]]),
        tokens=np.array([[1.0], [1.0], [0.0]]),
        logits=np.array([[2.0, 1.0, -1.0]]),
    )
    found = virtual_similarity(virtual)
    # In: (1, 1) and (0, 3), cosine 1/√2. Out: 1 and −1.
    assert found[1, 2] == pytest.approx((1 / np.sqrt(2) - 1) / 2)
    # Of layers 0 and 1 only tokens before (1 and 1) and the logit behind (2 and 1) are compared.
    assert found[0, 1] == pytest.approx(1)
    np.testing.assert_allclose(found, found.T)
    np.testing.assert_allclose(np.diag(found), 1)


def test_coactivation_and_what_is_unknown():
    values = np.array([[1, 2, 0, 0], [0, 0, 0, 1], [3, 6, 0, 0], [0, 0, 0, 1]], np.float32)
    found = Activity(values, np.array([5, 6, 7, 6])).similarity()
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 3] == pytest.approx(np.corrcoef(values[:, 0], values[:, 3])[0, 1])
    assert np.isnan(found[2]).all()
    virtual = np.full((4, 4), 0.5)
    both = combined(virtual, found, 0.25)
    assert both[0, 1] == pytest.approx(0.25 * 0.5 + 0.75)
    assert both[0, 2] == 0.5
    assert Activity(values, np.array([5, 6, 7, 6])).fires_on(np.array([0, 3]), 2) == [6, 7]


def test_virtual_weights_to_combinations_of_logits(random_lm):
    lm = random_lm("llama")
    family = random_family(lm)
    words = build_graph(lm, family, [5, 9, 3], targets=[4, 11]).logit_tokens
    difference = {"tokens": {words[0]: 1.0, words[1]: -1.0}}
    graph = build_graph(lm, family, [5, 9, 3], targets=[4, difference, 11], settings=Settings(max_nodes=None))
    with torch.no_grad():
        sources = Sources.of(FrozenPrompt.of(lm, torch.tensor([5, 9, 3])), family)
        found = virtual_weights(sources, graph, graph.features[:4, [0, 2]], graph.activations[:4]).logits
    np.testing.assert_allclose(found[1], found[0] - found[2], atol=1e-12)
    assert np.abs(found[1]).max() > 1e-3


@pytest.mark.parametrize("cross", [False, True])
def test_virtual_weights_are_direct_effects_without_attention(random_lm, cross):
    """At one position, patterns zero and scales 1, an edge of the graph is the virtual weight."""
    lm = random_lm("llama")
    family = random_family(lm, cross=cross)
    tokens = [5, 9, 3]
    graph = build_graph(lm, family, tokens, targets=[4, 11], settings=Settings(max_nodes=None))
    with torch.no_grad():
        sources = Sources.of(FrozenPrompt.of(lm, torch.tensor(tokens)), family)
        at = np.flatnonzero(graph.features[:, 1] == 2)
        keys = graph.features[at][:, [0, 2]]
        found = virtual_weights(sources, graph, keys, graph.activations[at])
        frozen = sources.frozen
        for layer in frozen.layers:
            layer.pattern.zero_()
        from circuitflow.graphs.head_paths import split
        from circuitflow.graphs.heads import enter_of, read_of

        nodes = [*at.tolist(), graph.first_logit, graph.first_logit + 1]
        ends = [read_of(sources, graph, node) for node in nodes]
        made = split(sources, ends, [enter_of(sources, graph, node) for node in at.tolist()]).total.numpy()
    scales = np.array([float(frozen.layers[layer].mlp_norm.scale[2]) for layer, _ in keys])
    np.testing.assert_allclose(
        made[:-2], found.between * scales[:, None] * graph.activations[at][:, None], rtol=1e-8, atol=1e-12
    )
    np.testing.assert_allclose(made[-2:], found.logits * float(frozen.final_norm.scale[2]), rtol=1e-8)

"""Influence, pruning and scores of attribution graphs, worked by hand; and the stage that makes their files."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from circuitflow.dictionaries.family import save_family
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.influence import cut, influence, prune, scores, whole_influence
from circuitflow.graphs.order import Known
from circuitflow.graphs.pruning import prune_graph
from circuitflow.graphs.stage import BUILT, build_attribution_graph
from circuitflow.jobs import Output
from circuitflow.store.files import read_json
from circuitflow.store.tables import read_table
from tests.fixtures.graph_examples import random_family

TWELVE = {11: (1, 3, 6, 8), 3: (0, 1, 6), 1: (9, 10), 0: (9,)}


def twelve() -> np.ndarray:
    weights = np.zeros((12, 12))
    for target, sources in TWELVE.items():
        weights[target, list(sources)] = -0.7
    return weights


def small(probabilities=(0.75, 0.25)) -> Graph:
    """Two features (0, 1), one error (2), one token (3), two logits (4, 5)."""
    rows = {
        0: [0, 0, 1, 3, 0, 0],  # feature of layer 0: error 1/4, token 3/4
        1: [2, 0, 0, -2, 0, 0],  # feature of layer 1: feature 1/2, token 1/2
        4: [0, 4, 4, 0, 0, 0],
        5: [0, 0, 0, -1, 0, 0],
    }
    return Graph(
        prompt="x",
        tokens=("x",),
        token_ids=np.array([1]),
        features=np.array([[0, 0, 3], [1, 0, 8]]),
        activations=np.array([1.0, 2.0]),
        errors=np.array([[0, 0]]),
        logits=np.array([7, 9]),
        logit_tokens=("a", "b"),
        probabilities=np.array(probabilities),
        targets=np.array(list(rows)),
        weights=np.array(list(rows.values()), dtype=np.float32),
        bias=np.zeros(4),
    )


def test_influence_of_twelve_nodes():
    p = np.zeros(12)
    p[11] = 1
    expected = np.array([1 / 12, 1 / 3, 0, 1 / 4, 0, 0, 1 / 3, 0, 1 / 4, 1 / 4, 1 / 6, 0])
    np.testing.assert_allclose(influence(twelve(), np.arange(12), p), expected, atol=1e-12)
    rows = np.array([0, 1, 3, 11])  # rows without effects can be left out
    np.testing.assert_allclose(influence(twelve()[rows], rows, p), expected, atol=1e-12)


def test_effects_in_a_circle_are_refused():
    with pytest.raises(ValueError, match="circle"):
        influence(np.array([[0.0, 1.0], [1.0, 0.0]]), np.arange(2), np.array([1.0, 0.0]))


def test_influence_while_rows_are_found_is_that_of_the_rows_there_are():
    """Features of layers 0, 0, 1, 2; the logit and the features of the two higher layers have rows."""
    generator = np.random.default_rng(0)
    layers = np.array([0, 0, 1, 2])
    table = np.zeros((3, 6), dtype=np.float64)
    table[0] = generator.standard_normal(6)
    table[1] = generator.standard_normal(6) * [1, 1, 1, 0, 1, 1]  # feature 3
    table[2] = generator.standard_normal(6) * [1, 1, 0, 0, 1, 1]  # feature 2
    known = Known(table, layers, np.array([0.6]))
    known.add(0, 3)
    chosen = np.array([3, 2])
    square, p = np.zeros((7, 7)), np.zeros(7)
    square[[6, 3, 2], :6] = table
    p[6] = 0.6
    expected = influence(square, np.arange(7), p)[:4]
    np.testing.assert_allclose(known.influence(chosen), expected, rtol=1e-10)
    assert known.most_influential(chosen, 1).tolist() == [int(np.argmax(expected[:2]))]


def test_scores_by_hand():
    """Influence: feature 1 3/8, error 3/8 + 3/64, feature 0 3/16, token 3/16 + 9/64 + 1/4."""
    graph = small()
    p = np.array([0, 0, 0, 0, 0.75, 0.25])
    found = influence(graph.weights, graph.targets, p)
    np.testing.assert_allclose(found, [3 / 16, 3 / 8, 27 / 64, 37 / 64, 0, 0])
    told = scores(graph)
    assert told.replacement == pytest.approx(37 / 64)
    # errors make up 1/4 of what feature 0 gets and 1/2 of what the first logit gets
    total = 3 / 16 + 3 / 8 + 27 / 64 + 37 / 64 + 1
    assert told.completeness == pytest.approx(1 - (3 / 16 / 4 + 0.75 / 2) / total)
    only = scores(small((0.0, 1.0)))
    assert only.replacement == 1
    assert only.completeness == 1


def test_pruning_by_hand():
    """Half of all influence (25/16) is with the token (37/64) and the error (27/64): features go, and their edges."""
    kept = prune(small(), node_share=0.5, edge_share=1.0)
    assert kept.nodes.tolist() == [False, False, True, True, True, True]
    assert kept.edges.tolist() == [[4, 2], [5, 3]]
    assert kept.weights.tolist() == [4.0, -1.0]
    np.testing.assert_allclose(kept.shares, [0.75, 0.25])
    whole = prune(small(), node_share=1.0, edge_share=1.0)
    assert whole.nodes.all()
    assert len(whole.edges) == 7
    np.testing.assert_allclose(whole.influence, [3 / 16, 3 / 8, 27 / 64, 37 / 64, 0, 0])


def test_nodes_that_lead_nowhere_after_pruning_go():
    """With few edges: the strongest is logit ← feature 1 / error (3/8 each); what only fed others is dropped."""
    kept = prune(small(), node_share=1.0, edge_share=0.3)
    assert {tuple(edge) for edge in kept.edges.tolist()} == {(4, 2)}  # feature 1 has lost what reaches it
    assert kept.nodes.tolist() == [False, False, True, True, True, True]


def test_features_without_a_row_stay_for_their_influence():
    """Feature 0 is a source alone, as keep_all leaves it: what reaches it is not known."""
    whole = small()
    graph = replace(whole, targets=whole.targets[1:], weights=whole.weights[1:], bias=whole.bias[1:])
    kept = prune(graph, node_share=1.0, edge_share=1.0)
    assert kept.nodes.all()
    assert [1, 0] in kept.edges.tolist()
    np.testing.assert_allclose(kept.influence, whole_influence(graph))
    np.testing.assert_allclose(kept.influence[0], 3 / 16)
    # what it feeds has lost every cause, and goes; then nothing is left that it leads to
    assert prune(graph, node_share=1.0, edge_share=0.3).nodes.tolist() == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]


def test_cut_is_the_smallest_value_that_is_needed():
    values = np.array([1.0, 4.0, 3.0, 2.0])
    assert [cut(values, share) for share in (0.3, 0.4, 0.7, 0.71, 1.0)] == [4.0, 4.0, 3.0, 2.0, 1.0]
    assert cut(np.zeros(3), 0.5) == 0


def test_the_stage_writes_graph_tables_and_summary(toy_manifest, tmp_path):
    from circuitflow.models.loading import load_model

    manifest = toy_manifest("llama")
    lm = load_model(manifest)
    family = random_family(lm)
    for number, member in enumerate(family.members):
        save_family(tmp_path / str(number), SimpleNamespace(members=(member,)))
    paths = [tmp_path / str(number) / "weights.safetensors" for number in range(len(family.members))]
    settings = {
        "max_logits": 3, "probability": 0.99, "max_nodes": 30, "reorder_every": 10, "batch": 7, "keep_all": False,
        "prepend_bos": True,
    }  # fmt: skip
    assert set(settings) == set(BUILT)
    params = {
        "prompt": {"name": "one", "text": "The teacher near the farmers", "targets": None}, "model": "toy",
        "dictionaries": "random", "dtype": "float32", "compute": {"device": "cpu"}, **settings,
    }  # fmt: skip
    names = {"graph": "safetensors", "nodes": "parquet", "edges": "parquet", "summary": "json"}
    for folder in ("a", "b"):
        files = {name: tmp_path / folder / f"{name}.{ending}" for name, ending in names.items()}
        out = Output(tmp_path, files, {})
        build_attribution_graph({"model": manifest, "dictionaries": paths}, params, out)
        prune_graph({"graph": files["graph"]}, {"node_share": 0.8, "edge_share": 0.98}, out)
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes(), name
    graph, nodes, edges = Graph.load(files["graph"]), read_table(files["nodes"]), read_table(files["edges"])
    assert graph.token_ids[0] == 2
    assert len(graph.features) == nodes["expanded"].sum() - len(graph.logits) == 30
    assert nodes["id"].tolist() == graph.node_ids()
    assert set(edges["source"]) | set(edges["target"]) <= set(nodes["id"][nodes["kept"]])
    assert (np.diff(edges["share"]) <= 0).all()
    told = read_json(files["summary"])
    assert told["largest_deviation"] < 1e-4
    assert told["kept_edges"] == len(edges["weight"])
    assert told["pruning"] == {"node_share": 0.8, "edge_share": 0.98}
    assert told["nodes"]["feature"] == 30
    assert 0 < told["facts"]["influence_left_out"] < 1
    assert told["replacement_score"] == scores(graph).replacement

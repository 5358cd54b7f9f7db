"""Exchange of attribution graphs: the viewer's JSON by hand and back, circuit-tracer's plain tensors and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from circuitflow.errors import UserError
from circuitflow.graphs.formats.circuit_tracer import read_circuit_tracer, write_circuit_tracer
from circuitflow.graphs.formats.viewer import (
    Told,
    cumulative,
    pair,
    unpair,
    viewer_ids,
    viewer_value,
    write_viewer,
)
from circuitflow.graphs.formats.viewer_reading import read_viewer, whole
from circuitflow.graphs.graph import NO_TOKEN, Graph
from circuitflow.graphs.influence import prune, scores
from tests.fixtures.synthetic_graph import large, small

TOLD = Told("keys", "toy", labels={(0, 7): "plural noun"}, supernodes={"keys": [0, 1]}, pinned=[12])


def value_of(graph: Graph, told: Told = TOLD) -> dict[str, Any]:
    return viewer_value(graph, whole(graph), told)


def links_of(value: dict[str, Any]) -> set[tuple[str, str, float]]:
    return {(link["source"], link["target"], link["weight"]) for link in value["links"]}


def effects(graph: Graph) -> dict[tuple[str, str], float]:
    """Direct effects by the names of their ends."""
    names = graph.node_ids()
    row, column = np.nonzero(graph.weights)
    return {
        (names[up], names[graph.targets[at]]): float(graph.weights[at, up])
        for at, up in zip(row.tolist(), column.tolist(), strict=True)
    }


def test_cantor_pairs() -> None:
    """The first ones by hand; 12 and 4,095 as circuit-tracer numbers feature 4,095 of layer 12."""
    assert [pair(0, 0), pair(1, 0), pair(0, 1), pair(2, 0), pair(1, 1), pair(0, 2)] == [0, 1, 2, 3, 4, 5]
    assert pair(12, 4095) == 4107 * 4108 // 2 + 4095
    assert [unpair(number) for number in range(6)] == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    assert unpair(pair(29, 10**12)) == (29, 10**12)


def test_the_viewer_value_by_hand() -> None:
    value = value_of(small())
    assert [node["node_id"] for node in value["nodes"]] == [
        "0_7_1", "0_7_2", "1_4_2", "0_-1_2", "1_-1_2", "E_5_0", "E_6_1", "E_7_2", "3_9_2", "3_3_2",
    ]  # fmt: skip
    feature, token, logit = value["nodes"][0], value["nodes"][5], value["nodes"][8]
    assert {
        key: feature[key] for key in ("feature", "layer", "ctx_idx", "clerp", "activation", "jsNodeId")
    } == {
        "feature": 7 * 8 // 2 + 7,
        "layer": "0",
        "ctx_idx": 1,
        "clerp": "plural noun",
        "activation": 1.5,
        "jsNodeId": "0_7-0",
    }
    assert (token["layer"], token["feature_type"]) == ("E", "embedding")
    assert (logit["clerp"], logit["token_prob"], logit["is_target_logit"]) == (
        'Output " d" (p=0.750)',
        0.75,
        True,
    )
    first = value["links"][0]
    assert (first["source"], first["target"], first["weight"]) == ("E_5_0", "0_7_1", 1.0)
    assert ("1_-1_2", "3_9_2", -0.5) in links_of(value)
    assert len(value["links"]) == 11
    assert value["qParams"]["supernodes"] == [["keys", "0_7_1", "0_7_2"]]
    assert value["qParams"]["pinnedIds"] == ["3_9_2", "0_7_1", "0_7_2"]
    assert value["metadata"]["prompt_tokens"] == ["a", " b", " c"]


def test_influence_is_cumulative() -> None:
    np.testing.assert_allclose(cumulative(np.array([1.0, 5.0, 2.0, 0.0])), [1.0, 0.625, 0.875, 1.0])


def test_no_error_has_the_name_of_a_feature() -> None:
    """Where circuit-tracer's names collide: layer 0, feature 1 at position 2, and the error of layer 1 there."""
    graph = replace(small(), features=np.array([[0, 1, 7], [0, 2, 1], [1, 2, 4]]))
    assert len(set(viewer_ids(graph))) == graph.n_nodes


@pytest.mark.parametrize("graph", [small(), large(40)], ids=["small", "large"])
def test_there_and_back(tmp_path: Path, graph: Graph) -> None:
    kept = prune(graph, 0.9, 0.98)
    path = tmp_path / "graph.json"
    write_viewer(
        path,
        graph,
        kept,
        replace(TOLD, pinned=[graph.first_logit], supernodes={"one": [int(np.flatnonzero(kept.nodes)[0])]}),
    )
    back = read_viewer(path)
    names = graph.node_ids()
    expected = {
        (names[up], names[down]): float(weight)
        for (down, up), weight in zip(kept.edges.tolist(), kept.weights.tolist(), strict=True)
    }
    assert effects(back.graph) == expected
    assert back.graph.tokens == graph.tokens
    assert back.graph.logit_tokens == graph.logit_tokens
    np.testing.assert_array_equal(back.graph.token_ids, graph.token_ids)
    np.testing.assert_array_equal(back.graph.probabilities, graph.probabilities)
    assert back.pinned == [back.graph.first_logit, back.supernodes["one"][0]]
    assert back.graph.facts["n_layers"] == graph.facts["n_layers"]
    again = tmp_path / "again.json"
    write_viewer(again, back.graph, whole(back.graph), Told("again", "toy"))
    assert links_of(json.loads(again.read_text())) == links_of(json.loads(path.read_text()))
    np.testing.assert_allclose(back.kept.shares.sum(), kept.shares.sum())


def test_equal_graphs_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_viewer(tmp_path / name, large(40), prune(large(40)), TOLD)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_direction_gets_a_number_after_the_vocabulary(tmp_path: Path) -> None:
    graph = replace(small(), logits=np.array([9, NO_TOKEN]))
    assert viewer_ids(graph)[-1] == "3_51_2"
    write_viewer(tmp_path / "graph.json", graph, whole(graph), TOLD)
    assert read_viewer(tmp_path / "graph.json").graph.logits.tolist() == [9, NO_TOKEN]


def theirs() -> dict[str, Any]:
    """A value as circuit-tracer writes it: its own names of errors, nothing of ours in the metadata."""
    value = value_of(small())
    for key in ("circuitflow", "info"):
        del value["metadata"][key]
    text = json.dumps(value)
    for layer in (0, 1):
        text = text.replace(f'"{layer}_-1_2"', f'"0_{layer}_2"')
    return json.loads(text)


def test_reading_circuit_tracers_names(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(theirs()))
    back = read_viewer(path).graph
    assert effects(back) == effects(small())
    assert back.errors.tolist() == [[0, 2], [1, 2]]
    assert back.facts["n_layers"] == 2
    assert np.isnan(back.bias).all()


def test_activations_may_be_missing(tmp_path: Path) -> None:
    value = theirs()
    del value["nodes"][0]["activation"]
    (tmp_path / "graph.json").write_text(json.dumps(value))
    back = read_viewer(tmp_path / "graph.json")
    np.testing.assert_array_equal(back.graph.activations, [np.nan, 2.5, 7.5])
    write_viewer(tmp_path / "again.json", back.graph, back.kept, Told("again", "toy"))
    assert "NaN" not in json.dumps(json.loads((tmp_path / "again.json").read_text())["nodes"])


def test_features_are_read_from_names_or_pairs(tmp_path: Path) -> None:
    value = theirs()
    names = {"0_7_1": "first", "0_7_2": "second", "1_4_2": "third"}
    text = json.dumps(value)
    for old, new in names.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    (tmp_path / "graph.json").write_text(text)
    assert read_viewer(tmp_path / "graph.json").graph.features.tolist() == [[0, 1, 7], [0, 2, 7], [1, 2, 4]]
    (tmp_path / "graph.json").write_text(text.replace('"feature": 35', '"feature": 34'))
    with pytest.raises(UserError, match="a feature 'first' of number 34, none of layer 0"):
        read_viewer(tmp_path / "graph.json")


def test_files_that_are_no_graphs(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    bad = theirs()
    bad["nodes"][3]["node_id"] = "0_7_2"
    cases = [
        ([], "has no metadata"),
        ({"metadata": {}, "nodes": [], "links": []}, "has no metadata.prompt_tokens"),
        (bad, "two nodes with the id 0_7_2"),
        (
            theirs() | {"links": [{"source": "E_5_0", "target": "9_9_9", "weight": 1}]},
            "target '9_9_9', which is no node",
        ),
        (theirs() | {"nodes": [{"feature_type": "neuron", "node_id": "x"}]}, "a node of type 'neuron'"),
    ]
    for value, message in cases:
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=message):
            read_viewer(path)


def test_plain_tensors_of_circuit_tracer_there_and_back(tmp_path: Path) -> None:
    graph = large(40)
    write_circuit_tracer(tmp_path / "plain.safetensors", graph)
    back = read_circuit_tracer(tmp_path / "plain.safetensors")
    assert effects(back) == effects(graph)
    for name in ("features", "errors", "logits", "token_ids", "activations", "targets"):
        np.testing.assert_array_equal(getattr(back, name), getattr(graph, name))
    assert (back.tokens, back.prompt, back.logit_tokens) == (graph.tokens, graph.prompt, graph.logit_tokens)
    np.testing.assert_allclose(scores(back), scores(graph), rtol=1e-6)
    write_circuit_tracer(tmp_path / "again.safetensors", back)
    assert (tmp_path / "again.safetensors").read_bytes() != b""
    assert effects(read_circuit_tracer(tmp_path / "again.safetensors")) == effects(graph)


def test_plain_tensors_by_hand(tmp_path: Path) -> None:
    """Errors that are no nodes get their place; a direction its number after the vocabulary."""
    graph = small()
    fewer = replace(
        graph,
        errors=graph.errors[3:],
        weights=np.delete(graph.weights, [3, 4, 5], axis=1),
        targets=np.array([0, 1, 2, 9, 10]),
        logits=np.array([9, NO_TOKEN]),
    )
    write_circuit_tracer(tmp_path / "plain.safetensors", fewer)
    with safe_open(tmp_path / "plain.safetensors", framework="np") as opened:
        adjacency, tokens = opened.get_tensor("adjacency_matrix"), opened.get_tensor("logit_token_ids")
    expected = np.zeros((14, 14), dtype=np.float32)
    expected[[0, 1, 2, 12, 13]] = graph.weights
    expected[:, [3, 4, 5]] = 0
    np.testing.assert_array_equal(adjacency, expected)
    assert tokens.tolist() == [9, 51]


def test_the_shape_of_the_model_is_taken_from_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4})
    )
    write_circuit_tracer(tmp_path / "plain.safetensors", small(), tmp_path)
    cfg = read_circuit_tracer(tmp_path / "plain.safetensors").facts["circuit_tracer"]
    assert (cfg["d_model"], cfg["d_head"], cfg["d_vocab"], cfg["model_name"]) == (16, 4, 50, "toy")
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 1}))
    with pytest.raises(UserError, match="nodes of 2 layers and the model has 1"):
        write_circuit_tracer(tmp_path / "plain.safetensors", small(), tmp_path)


def test_other_files_are_told_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "graph.pt").write_bytes(b"PK")
    with pytest.raises(
        UserError, match=r"no plain graph of circuit-tracer; .*to-plain GRAPH.pt PLAIN.safetensors"
    ):
        read_circuit_tracer(tmp_path / "graph.pt")
    write_circuit_tracer(tmp_path / "plain.safetensors", small())
    with safe_open(tmp_path / "plain.safetensors", framework="np") as opened:
        said, arrays = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    arrays["adjacency_matrix"] = arrays["adjacency_matrix"][1:, 1:].copy()
    save_file(arrays, tmp_path / "short.safetensors", metadata=said)
    with pytest.raises(UserError, match=r"an adjacency matrix of \(13, 13\), expected \(14, 14\)"):
        read_circuit_tracer(tmp_path / "short.safetensors")

"""Exchange of attribution graphs: the viewer's JSON by hand and back, circuit-tracer's plain tensors and back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from circuitflow.errors import UserError
from circuitflow.graphs.building import Settings, build_graph
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
from tests.fixtures.graph_examples import random_family
from tests.fixtures.synthetic_graph import large, small

TOLD = Told("keys", "toy", labels={(0, 7): "plural noun"}, supernodes={"keys": [0, 1]}, pinned=[12])


@pytest.fixture(scope="module")
def built(random_lm: Callable[..., Any]) -> Graph:
    """A graph as the stage leaves it, of a token and of a direction, over small token ids."""
    lm = random_lm("llama", dtype="float32")
    more = {"name": "more", "tokens": {4: 1.0, 11: -1.0}, "weight": 2.0}
    return build_graph(lm, random_family(lm), [3, 17, 9], targets=[4, more], settings=Settings(max_nodes=8))


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
    np.testing.assert_allclose(back.kept.shares, kept.shares)


def test_equal_graphs_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_viewer(tmp_path / name, large(40), prune(large(40)), TOLD)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_direction_gets_a_number_after_the_vocabulary(tmp_path: Path) -> None:
    graph = replace(small(), logits=np.array([9, NO_TOKEN]))
    assert viewer_ids(graph)[-1] == "3_51_2"
    write_viewer(tmp_path / "graph.json", graph, whole(graph), TOLD)
    assert read_viewer(tmp_path / "graph.json").graph.logits.tolist() == [9, NO_TOKEN]


def test_a_direction_has_a_weight_and_no_probability(
    tmp_path: Path, built: Graph, random_lm: Callable[..., Any]
) -> None:
    value = viewer_value(built, whole(built), TOLD)
    token, direction = value["nodes"][-2:]
    vocabulary = random_lm("llama", dtype="float32").hf.config.vocab_size
    assert vocabulary > 20
    assert direction["feature"] == vocabulary + 1
    assert (direction["token_prob"], direction["weight"]) == (0.0, 2.0)
    assert direction["clerp"] == 'Output "more" (p=none, weight 2)'
    assert "weight" not in token
    write_viewer(tmp_path / "graph.json", built, whole(built), TOLD)
    back = read_viewer(tmp_path / "graph.json").graph
    assert back.logits.tolist() == [4, NO_TOKEN]
    assert back.logit_tokens == built.logit_tokens
    np.testing.assert_allclose(back.probabilities, built.probabilities, rtol=1e-6)
    write_circuit_tracer(tmp_path / "plain.safetensors", built)
    plain = read_circuit_tracer(tmp_path / "plain.safetensors")
    assert plain.logits.tolist() == [4, NO_TOKEN]
    assert plain.facts["vocab_size"] == vocabulary


def test_shares_by_hand() -> None:
    """Into the first output (p = 0.75) run 3, −0.5 and 0.25; the second feature passes on what it has of that."""
    kept = whole(small())
    found = {
        (int(up), int(down)): share
        for (down, up), share in zip(kept.edges, kept.shares.tolist(), strict=True)
    }
    assert found[2, 12] == pytest.approx(0.75 * 3 / 3.75)
    assert found[1, 13] == pytest.approx(0.125)
    assert found[0, 2] == pytest.approx(0.6 * 2 / 7)
    assert found[1, 2] == pytest.approx(0.6 * 4 / 7)


def test_a_whole_graph_has_the_shares_of_one_of_which_pruning_takes_nothing() -> None:
    graph = large(40)
    kept, pruned = whole(graph), prune(graph, 1.0, 1.0)
    shares = {tuple(ends): share for ends, share in zip(kept.edges.tolist(), kept.shares, strict=True)}
    assert len(pruned.edges) > 500
    found = [shares[tuple(ends)] for ends in pruned.edges.tolist()]
    np.testing.assert_allclose(found, pruned.shares, rtol=1e-6)
    np.testing.assert_array_equal(kept.influence, pruned.influence)


def test_a_file_without_shares_gets_those_within_the_file(tmp_path: Path) -> None:
    value = theirs()
    for link in value["links"]:
        del link["share"]
    (tmp_path / "graph.json").write_text(json.dumps(value))
    np.testing.assert_allclose(read_viewer(tmp_path / "graph.json").kept.shares, whole(small()).shares)


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


NODE = "Graph .*graph.json: node 0 "


@pytest.mark.parametrize(
    ("node", "changes", "message"),
    [
        (0, None, NODE + "has no node_id"),
        (0, {"node_id": None}, NODE + "has no node_id"),
        (0, {"layer": "E"}, NODE + r"\(0_7_1\) has layer 'E'; expected a whole number from 0"),
        (0, {"layer": None}, "has layer None"),
        (0, {"ctx_idx": 3}, "has ctx_idx 3; expected a whole number from 0 to 2"),
        (0, {"feature": -1}, "has feature -1"),
        (0, {"activation": "high"}, "has activation 'high'; expected a number"),
        (3, {"ctx_idx": None}, "has ctx_idx None"),
        (5, {"ctx_idx": "one"}, "has ctx_idx 'one'"),
        (5, {"ctx_idx": 1}, "two token nodes at one position"),
        (8, {"layer": "out"}, "has layer 'out'"),
        (8, {"feature": None}, "has feature None"),
        (8, {"token_prob": "0.5"}, "has token_prob '0.5'"),
    ],
)
def test_nodes_that_are_not_as_expected(
    tmp_path: Path, node: int, changes: dict[str, Any] | None, message: str
) -> None:
    value = theirs()
    changed = None if changes is None else value["nodes"][node] | changes
    if changed is not None:
        changed = {key: item for key, item in changed.items() if item is not None}
    value["nodes"][node] = changed
    (tmp_path / "graph.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        read_viewer(tmp_path / "graph.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"links": ["E_5_0"]}, "link 0 has no weight"),
        ({"links": [{"source": "E_5_0", "target": "0_7_1"}]}, "link 0 has no weight"),
        ({"links": [{"source": "E_5_0", "target": "0_7_1", "weight": float("nan")}]}, "link 0 has no weight"),
        (
            {"links": [{"source": ["E_5_0"], "target": "0_7_1", "weight": 1}]},
            r"source \['E_5_0'\], which is no",
        ),
        (
            {
                "links": [
                    {"source": "0_7_1", "target": "1_4_2", "weight": 1},
                    {"source": "1_4_2", "target": "0_7_1", "weight": 1},
                    {"source": "1_4_2", "target": "3_9_2", "weight": 1},
                ]
            },
            "cannot be followed: effects of the graph go round in a circle",
        ),
        ({"qParams": ["0_7_1"]}, "qParams without lists"),
        ({"qParams": {"pinnedIds": "0_7_1"}}, "qParams without lists"),
        ({"qParams": {"supernodes": ["keys"]}}, "a supernode that is no list"),
        ({"metadata": {"prompt_tokens": []}}, "no metadata.prompt_tokens"),
    ],
)
def test_links_and_annotations_that_are_not_as_expected(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "graph.json").write_text(json.dumps(theirs() | changes))
    with pytest.raises(UserError, match=message):
        read_viewer(tmp_path / "graph.json")


def test_outputs_stand_above_every_layer_however_the_file_counts(tmp_path: Path) -> None:
    value = theirs()
    for node in value["nodes"][8:]:
        node["layer"] = "2"
    (tmp_path / "graph.json").write_text(json.dumps(value))
    assert read_viewer(tmp_path / "graph.json").graph.facts["n_layers"] == 2


def test_what_pruning_kept_is_told(tmp_path: Path) -> None:
    value = theirs()
    value["metadata"] |= {"node_threshold": 0.7, "pruning_settings": None}
    (tmp_path / "graph.json").write_text(json.dumps(value))
    assert read_viewer(tmp_path / "graph.json").graph.facts["pruned"] == {"node_threshold": 0.7}


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
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


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


def test_the_vocabulary_of_a_graph_that_does_not_say_is_the_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "vocab_size": 77}))
    graph = replace(small(), logits=np.array([9, NO_TOKEN]), facts={"n_layers": 2})
    for model, size in ((tmp_path, 77), (None, 10)):
        write_circuit_tracer(tmp_path / "plain.safetensors", graph, model)
        back = read_circuit_tracer(tmp_path / "plain.safetensors")
        assert (back.facts["vocab_size"], back.facts["circuit_tracer"]["d_vocab"]) == (size, size)
        with safe_open(tmp_path / "plain.safetensors", framework="np") as opened:
            assert opened.get_tensor("logit_token_ids").tolist() == [9, size + 1]
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "vocab_size": 7}))
    with pytest.raises(UserError, match="a token of id 7 and the model a vocabulary of 7"):
        write_circuit_tracer(tmp_path / "plain.safetensors", graph, tmp_path)


def test_tokens_that_a_viewers_file_does_not_show_are_not_made_up(tmp_path: Path) -> None:
    value = theirs()
    del value["nodes"][6]
    value["links"] = [link for link in value["links"] if link["source"] != "E_6_1"]
    (tmp_path / "graph.json").write_text(json.dumps(value))
    graph = read_viewer(tmp_path / "graph.json").graph
    assert graph.token_ids.tolist() == [5, NO_TOKEN, 7]
    with pytest.raises(UserError, match=r"which tokens stand at positions \[1\]"):
        write_circuit_tracer(tmp_path / "plain.safetensors", graph)


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

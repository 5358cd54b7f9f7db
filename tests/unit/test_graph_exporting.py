"""Descriptions of graph features by hand, the exported graph, feature files, and the commands that convert graphs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.dictionary import Dictionary, save_dictionary
from circuitflow.errors import UserError
from circuitflow.graphs import describing
from circuitflow.graphs.converting import convert_graph, detected, export_graphs
from circuitflow.graphs.describing import chosen_features, describe_graph_features
from circuitflow.graphs.exporting import export_graph
from circuitflow.graphs.formats.circuit_tracer import write_circuit_tracer
from circuitflow.graphs.formats.feature_files import BINS, feature_value
from circuitflow.graphs.formats.viewer_reading import read_viewer
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.influence import prune, scores
from circuitflow.graphs.labels import label, labels, read_descriptions
from circuitflow.jobs import Output
from circuitflow.models.loading import load_model
from circuitflow.models.running import LanguageModel
from circuitflow.store.files import read_json, write_json
from tests.fixtures.activation_store import write_store
from tests.fixtures.synthetic_graph import large, small

WIDTH, BLOCK = 32, 8
SHARES = {"node_share": 0.9, "edge_share": 1.0}
DESCRIPTION: dict[str, Any] = {
    "feature": 7,
    "density": 0.125,
    "max": 4.0,
    "histogram": {"edges": [1.0, 2.0, 4.0], "counts": [1, 3]},
    "fires_on": [{"token": " keys"}, {"token": " Keys"}, {"token": "\n"}, {"token": " cities"}],
    "contexts": [{"tokens": ["the", " keys"], "activations": [0.0, 4.0], "peak": 1}],
    "logits": {
        "top": [{"token": " are"}, {"token": " were"}, {"token": " do"}],
        "bottom": [{"token": " is"}],
    },
}


def described(path: Path, features: list[dict[str, Any]], layer: int = 0) -> Path:
    write_json(path, {"sites": [{"site": f"mlp_in.{layer}", "features": features}]})
    return path


def test_labels_say_what_fires_and_what_is_promoted(tmp_path: Path) -> None:
    assert label(DESCRIPTION) == "keys, ↵, cities → are, were"
    assert label({"logits": DESCRIPTION["logits"]}) == "→ are, were"
    found = read_descriptions(described(tmp_path / "features.json", [DESCRIPTION, {"feature": 8}], 3))
    assert labels(found) == {(3, 7): "keys, ↵, cities → are, were"}


def test_a_feature_file_by_hand() -> None:
    value = feature_value(1, 2, DESCRIPTION, "toy")
    assert value["index"] == 3 * 4 // 2 + 2
    assert value["examples_quantiles"][0]["examples"] == [
        {
            "tokens": ["the", " keys"],
            "tokens_acts_list": [0.0, 4.0],
            "train_token_ind": 1,
            "is_repeated_datapoint": False,
        }
    ]
    assert (value["top_logits"], value["bottom_logits"]) == ([" are", " were", " do"], [" is"])
    assert (value["act_min"], value["act_max"], value["activation_frequency"]) == (0.0, 4.0, 0.125)
    histogram, quantiles = np.array(value["histogram"]), np.array(value["quantile_values"])
    assert len(histogram) == BINS
    assert histogram.sum() == pytest.approx(4)
    assert histogram[:12].sum() == 0  # below 1
    np.testing.assert_allclose(histogram[13:24], 4 / BINS)  # one firing, spread over 1 to 2
    np.testing.assert_allclose(histogram[26:], 3 * 4 / BINS / 2)  # three over 2 to 4
    assert quantiles[24] == pytest.approx(2.0)  # the 25th percentile
    assert quantiles[-1] == pytest.approx(4.0)


def test_a_silent_feature_has_an_empty_file() -> None:
    value = feature_value(0, 0, {"logits": {"top": [], "bottom": []}}, "toy")
    assert sum(value["histogram"]) == sum(value["quantile_values"]) == 0
    assert value["examples_quantiles"][0]["examples"] == []


def exported(tmp_path: Path, graph: Graph, **inputs: Any) -> dict[str, Any]:
    graph.save(tmp_path / "graph.safetensors")
    out = Output(tmp_path, {"json": tmp_path / "graph.json"}, {"stage": "export_graph"})
    params = {**SHARES, "slug": "keys", "scan": None, "feature_url": None}
    export_graph({"graph": tmp_path / "graph.safetensors", **inputs}, params, out)
    value: dict[str, Any] = read_json(tmp_path / "graph.json")
    return value


def test_the_exported_graph(tmp_path: Path) -> None:
    graph = small()
    write_json(
        tmp_path / "supernodes.json",
        {"supernodes": {"one": ["0_7_1", "0_7_2", "9_9_9"]}, "labels": {"one": "keys"}},
    )
    features = described(tmp_path / "features.json", [DESCRIPTION])
    value = exported(tmp_path, graph, features=[features], supernodes=[tmp_path / "supernodes.json"])
    metadata = value["metadata"]
    assert (metadata["slug"], metadata["scan"]) == ("keys", "./data/features/transcoders")
    assert metadata["circuitflow"]["scores"] == scores(graph)._asdict()
    assert metadata["circuitflow"]["sizes"] == {"features": 3, "errors": 6}
    assert metadata["circuitflow"]["provenance"] == {"stage": "export_graph"}
    assert metadata["pruning_settings"] == {"node_threshold": 0.9, "edge_threshold": 1.0}
    words = {node["node_id"]: node["clerp"] for node in value["nodes"]}
    assert words["0_7_2"] == "keys, ↵, cities → are, were"
    assert words["1_4_2"] == ""
    assert value["qParams"]["supernodes"] == [["one: keys", "0_7_1", "0_7_2"]]
    assert len(value["links"]) == len(prune(graph, 0.9, 1.0).edges)


def test_without_descriptions_and_supernodes(tmp_path: Path) -> None:
    value = exported(tmp_path, small(), features=[], supernodes=[])
    assert value["qParams"]["pinnedIds"] == []
    assert {node["clerp"] for node in value["nodes"] if "transcoder" in node["feature_type"]} == {""}


def test_features_of_most_influence_are_described(tmp_path: Path) -> None:
    graph = large(40)
    graph.save(tmp_path / "a.safetensors")
    kept = prune(graph, 0.8, 0.98)
    inside = np.flatnonzero(kept.nodes[: graph.first_error])
    strongest = inside[np.argsort(-kept.influence[inside])[:5]]
    found = chosen_features(
        [tmp_path / "a.safetensors"] * 2, {"node_share": 0.8, "edge_share": 0.98, "features": 5}
    )
    assert {(layer, f) for layer, here in found.items() for f in here} == {
        (int(layer), int(feature)) for layer, _, feature in graph.features[strongest]
    }
    assert list(found) == sorted(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_descriptions_are_counted_by_hand(
    tmp_path: Path, toy_manifest: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Features are coordinates of what the MLP of layer 0 reads; the graph names feature 7."""
    loaded: list[LanguageModel] = []

    def load(*given: Any) -> LanguageModel:
        loaded.append(load_model(*given))
        return loaded[0]

    monkeypatch.setattr(describing, "load_model", load)
    rows, at = torch.eye(WIDTH), torch.zeros(WIDTH)
    x = np.zeros((3 * BLOCK, WIDTH), np.float32)
    x[[2, 9, 20], 7] = [1, 4, 2]
    tokens = np.arange(3 * BLOCK, dtype=np.int32).reshape(3, BLOCK) % 20 + 3
    documents = np.repeat([0, 1, 2], BLOCK).astype(np.int32).reshape(3, BLOCK)
    for layer in (0, 1):
        own = Dictionary("identity", (f"mlp_in.{layer}",), (f"mlp.{layer}",), "nonzero", rows, at, rows, at)
        save_dictionary(tmp_path / f"{layer}.safetensors", own)
    small().save(tmp_path / "graph.safetensors")
    inputs = {
        "model": toy_manifest(),
        "dictionaries": [tmp_path / "0.safetensors", tmp_path / "1.safetensors"],
        "activations": write_store(
            tmp_path, "activations", {"mlp_in.0": x, "mlp_in.1": 0 * x}, [], 16, BLOCK
        ),
        "corpus": write_store(tmp_path, "corpus", {"tokens": tokens, "documents": documents}, [], 2),
        "graphs": [tmp_path / "graph.safetensors"],
    }
    compute = {"threads": 1, "device": "cpu", "deterministic": True}
    limits = {"features": 10, "contexts": 2, "window": 3, "logits": 4, "dtype": dtype, "compute": compute}
    out = Output(tmp_path, {"features": tmp_path / "features.json"}, {})
    describe_graph_features(inputs, {**limits, "node_share": 1.0, "edge_share": 1.0}, out)
    assert str(loaded[0].dtype) == f"torch.{dtype}"
    found = read_descriptions(tmp_path / "features.json")
    assert set(found) == {(0, 7), (1, 4)}
    assert (found[0, 7]["density"], found[0, 7]["max"]) == (3 / 24, 4)
    assert [entry["id"] for entry in found[0, 7]["fires_on"]] == [
        int(tokens.ravel()[row]) for row in (9, 20, 2)
    ]
    assert len(found[0, 7]["contexts"]) == 2
    assert len(found[0, 7]["logits"]["top"]) == 4
    assert found[1, 4]["density"] == 0


def run_of(tmp_path: Path) -> Path:
    """Two exported graphs with descriptions, as a run leaves them."""
    source = tmp_path / "graphs" / "transcoders"
    for name, seed in (("a", 0), ("b", 1)):
        folder = source / name
        folder.mkdir(parents=True)
        value = exported(folder, large(40, seed=seed))
        value["metadata"]["slug"] = name
        write_json(folder / "graph.json", value)
    described(source / "features.json", [DESCRIPTION, {**DESCRIPTION, "feature": 9}])
    return source


def test_a_folder_for_the_viewer(tmp_path: Path) -> None:
    told = export_graphs(run_of(tmp_path), tmp_path / "out")
    assert "2 graphs and 2 features; view them with `circuit-tracer start-server --graph_file_dir" in told
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.json")}
    assert files == {
        "a.json",
        "b.json",
        "graph-metadata.json",
        "features/transcoders/35.json",
        "features/transcoders/54.json",
    }
    graphs = read_json(tmp_path / "out" / "graph-metadata.json")["graphs"]
    assert [graph["slug"] for graph in graphs] == ["a", "b"]
    assert graphs[0]["scan"] == "./data/features/transcoders"  # what its server gives for data_dir/features/…
    with pytest.raises(UserError, match="is in use; name a folder"):
        export_graphs(tmp_path / "graphs" / "transcoders", tmp_path / "out")
    with pytest.raises(UserError, match="holds no graphs"):
        export_graphs(tmp_path, tmp_path / "new")


def test_graphs_of_a_model_on_neuronpedia(tmp_path: Path) -> None:
    export_graphs(run_of(tmp_path), tmp_path / "out", "gemma-2-2b")
    assert read_json(tmp_path / "out" / "b.json")["metadata"]["scan"] == "gemma-2-2b"
    assert (tmp_path / "out" / "features" / "35.json").exists()


def test_converting_there_and_back(tmp_path: Path) -> None:
    graph = large(40)
    graph.save(tmp_path / "graph.safetensors")
    told = convert_graph(tmp_path / "graph.safetensors", tmp_path / "plain.safetensors", "circuit_tracer")
    assert "40 features, 36 errors, 6 tokens and 3 outputs" in told
    assert "(circuitflow) to circuit_tracer" in told
    convert_graph(tmp_path / "plain.safetensors", tmp_path / "back.safetensors", "circuitflow")
    np.testing.assert_array_equal(Graph.load(tmp_path / "back.safetensors").weights, graph.weights)
    features = described(tmp_path / "features.json", [DESCRIPTION])
    for source in ("graph", "back"):
        convert_graph(
            tmp_path / f"{source}.safetensors",
            tmp_path / f"{source}.json",
            "viewer",
            features=features,
            shares=(0.7, 0.9),
        )
    first, second = (read_json(tmp_path / f"{name}.json") for name in ("graph", "back"))
    ends = [[(x["source"], x["target"], x["weight"]) for x in value["links"]] for value in (first, second)]
    assert ends[0] == ends[1]
    assert len(first["links"]) == len(prune(graph, 0.7, 0.9).edges)
    convert_graph(tmp_path / "graph.json", tmp_path / "again.json", "viewer", scan="other")
    again = read_viewer(tmp_path / "again.json")
    assert again.scan == "other"
    assert again.facts["scores"] == scores(graph)._asdict()
    assert len(again.kept.edges) == len(first["links"])
    rewritten = read_json(tmp_path / "again.json")
    assert rewritten["links"] == first["links"]  # with the shares of the whole graph
    assert rewritten["metadata"]["pruning_settings"] == {"node_threshold": 0.7, "edge_threshold": 0.9}
    assert rewritten["metadata"]["node_threshold"] == 0.7
    convert_graph(tmp_path / "graph.json", tmp_path / "pruned.safetensors", "circuitflow")
    assert np.isnan(Graph.load(tmp_path / "pruned.safetensors").bias).all()


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    small().save(tmp_path / "graph.safetensors")
    (tmp_path / "graph.pt").touch()
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    cases: list[tuple[str, str, str]] = [
        (
            "graph.safetensors",
            "dot",
            "Format 'dot' of graphs is unknown; valid: circuitflow, viewer, circuit_tracer",
        ),
        ("nowhere.json", "viewer", "does not exist"),
        ("graph.pt", "viewer", "is a pickle, which is not opened here; .*to-plain"),
        ("torn.safetensors", "viewer", "is neither safetensors .* nor JSON"),
        (".", "viewer", r"is a folder; name a file in it, such as .*graph\.safetensors"),
    ]
    for source, to_format, message in cases:
        with pytest.raises(UserError, match=message):
            convert_graph(tmp_path / source, tmp_path / "new.json", to_format)
    for model in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(UserError, match=r"config.json cannot be read .*objects/OBJECT/hf"):
            convert_graph(
                tmp_path / "graph.safetensors", tmp_path / "new.safetensors", "circuit_tracer", model=model
            )
    with pytest.raises(UserError, match="exists; name a file that does not"):
        convert_graph(tmp_path / "graph.safetensors", tmp_path / "graph.pt", "viewer")


@pytest.mark.parametrize(
    ("to_format", "name", "ending"),
    [
        ("circuit_tracer", "a.pt", ".safetensors"),
        ("circuitflow", "a.json", ".safetensors"),
        ("viewer", "a.safetensors", ".json"),
    ],
)
def test_only_names_that_can_be_read_again_are_written(
    tmp_path: Path, to_format: str, name: str, ending: str
) -> None:
    small().save(tmp_path / "graph.safetensors")
    with pytest.raises(
        UserError, match=rf"{name} is no name for a {to_format} graph; end it with \{ending}\."
    ):
        convert_graph(tmp_path / "graph.safetensors", tmp_path / name, to_format)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "shares", [(80.0, 0.98), (-1.0, 0.98), (0.0, 0.98), (0.8, -1.0), (0.8, float("nan"))]
)
def test_shares_are_above_0_and_at_most_1(tmp_path: Path, shares: tuple[float, float]) -> None:
    small().save(tmp_path / "graph.safetensors")
    option = "--nodes" if shares[1] == 0.98 else "--edges"
    with pytest.raises(UserError, match=f"Option {option} is .* above 0 and at most 1"):
        convert_graph(tmp_path / "graph.safetensors", tmp_path / "a.json", "viewer", shares=shares)
    assert not (tmp_path / "a.json").exists()


def test_what_is_told_of_a_pruned_graph_is_in_its_file(tmp_path: Path) -> None:
    large(40).save(tmp_path / "graph.safetensors")
    told = convert_graph(tmp_path / "graph.safetensors", tmp_path / "a.json", "viewer", shares=(0.5, 0.7))
    graph = read_viewer(tmp_path / "a.json").graph
    assert len(graph.features) < 40
    assert (
        f"{len(graph.features)} of 40 features, {len(graph.errors)} of 36 errors, 6 tokens and 3 outputs"
        in told
    )
    again = convert_graph(tmp_path / "a.json", tmp_path / "b.json", "viewer")
    assert f"{len(graph.features)} features, {len(graph.errors)} errors, 6 tokens and 3 outputs" in again


@pytest.mark.parametrize(
    "value", [{"a": 1}, [1], {"sites": [{"site": "resid.1", "features": [{"feature": 1}]}]}]
)
def test_descriptions_of_something_else_are_refused(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "features.json", value)
    with pytest.raises(UserError, match="has no descriptions of graph features; name graphs/DICTIONARIES"):
        read_descriptions(tmp_path / "features.json")


def test_forms_are_told_apart(tmp_path: Path) -> None:
    graph = replace(small(), facts={"n_layers": 2})
    graph.save(tmp_path / "a.safetensors")
    write_circuit_tracer(tmp_path / "b.safetensors", graph)
    (tmp_path / "c.json").write_text(json.dumps({}))
    (tmp_path / "d.download").write_text("\n " + json.dumps({}))
    assert [detected(path) for path in sorted(tmp_path.iterdir())] == [
        "circuitflow",
        "circuit_tracer",
        "viewer",
        "viewer",
    ]

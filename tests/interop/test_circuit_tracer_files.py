"""Graphs through circuit-tracer's own classes: its pickles, its pruning, the files of its viewer."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuitflow.graphs.formats.circuit_tracer import read_circuit_tracer, write_circuit_tracer
from circuitflow.graphs.formats.feature_files import write_features
from circuitflow.graphs.formats.viewer import Told, write_viewer
from circuitflow.graphs.formats.viewer_reading import read_viewer
from circuitflow.graphs.graph import NO_TOKEN, Graph
from circuitflow.graphs.influence import Kept, prune
from circuitflow.models.toy import word_tokenizer
from tests.fixtures.peers import ROOT, run_peer
from tests.fixtures.synthetic_graph import large

pytestmark = [pytest.mark.peers, pytest.mark.slow]
SIDE = Path(__file__).with_name("circuit_tracer_graphs_side.py")
CONVERTER = ROOT / "resources" / "exchange" / "circuit_tracer_graph.py"

NOTHING: dict[str, Any] = {"top": [], "bottom": []}
DESCRIPTION = {
    "density": 0.125,
    "max": 4.0,
    "histogram": {"edges": [1.0, 2.0, 4.0], "counts": [1, 3]},
    "contexts": [{"tokens": ["the", " keys"], "activations": [0.0, 4.0], "peak": 1}],
    "logits": {"top": [{"token": " are"}], "bottom": [{"token": " is"}]},
}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return large()


@pytest.fixture(scope="module")
def folder(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph as their pickle, back as plain tensors, and as the files that they make for their viewer."""
    folder = tmp_path_factory.mktemp("graphs")
    word_tokenizer([f"word{number}" for number in range(40)]).save_pretrained(folder / "tokenizer")
    config = folder / "tokenizer" / "tokenizer_config.json"
    told = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # the older name
    config.write_text(json.dumps(told))
    named = Graph(
        **{**vars(graph), "facts": {**graph.facts, "model": str(folder / "tokenizer"), "scan": "toy"}}
    )
    write_circuit_tracer(folder / "plain.safetensors", named)
    run_peer("circuit-tracer", CONVERTER, "from-plain", folder / "plain.safetensors", folder / "graph.pt")
    run_peer("circuit-tracer", CONVERTER, "to-plain", folder / "graph.pt", folder / "back.safetensors")
    run_peer("circuit-tracer", SIDE, "files", folder / "graph.pt", folder / "viewer")
    return folder


def test_through_their_pickle_and_back(folder: Path, graph: Graph) -> None:
    back = read_circuit_tracer(folder / "back.safetensors")
    for name in ("features", "activations", "errors", "logits", "targets", "weights", "token_ids"):
        np.testing.assert_array_equal(getattr(back, name), getattr(graph, name))
    assert back.prompt == graph.prompt


def test_our_file_is_theirs(folder: Path, graph: Graph) -> None:
    """The same nodes and links, with the same numbers, but for the names of errors."""
    kept = prune(graph, 0.8, 0.98)
    assert 20 < kept.nodes.sum() < graph.n_nodes - 20
    write_viewer(folder / "ours.json", graph, kept, Told("theirs", "toy", pruning={"node_threshold": 0.8}))
    features = write_features(folder / "features", {(1, 2): DESCRIPTION, (3, 4): {"logits": NOTHING}}, "toy")
    direction = replace(graph, logits=np.array([31, 32, NO_TOKEN]))
    write_viewer(folder / "direction.json", direction, kept, Told("direction", "toy"))
    run_peer("circuit-tracer", SIDE, "check", folder / "ours.json", folder / "direction.json", *features)
    ours, theirs = (json.loads((folder / name).read_text()) for name in ("ours.json", "viewer/theirs.json"))
    names = {node["node_id"]: _theirs(node) for node in ours["nodes"]}
    assert len(set(names.values())) == len(names)
    mine = {names[node["node_id"]]: node for node in ours["nodes"]}
    assert mine.keys() == {node["node_id"] for node in theirs["nodes"]}
    for node in theirs["nodes"]:
        _check_node(mine[node["node_id"]], node)
    links = {(names[link["source"]], names[link["target"]]): link["weight"] for link in ours["links"]}
    assert links == {(link["source"], link["target"]): link["weight"] for link in theirs["links"]}
    known = theirs["metadata"].keys()
    same = {key: value for key, value in ours["metadata"].items() if key in known - {"prompt_tokens"}}
    assert same == {key: value for key, value in theirs["metadata"].items() if key != "prompt_tokens"}
    assert ours["qParams"] == theirs["qParams"]


def test_their_file_is_read(folder: Path, graph: Graph) -> None:
    kept = prune(graph, 0.8, 0.98)
    viewed = read_viewer(folder / "viewer" / "theirs.json")
    back = viewed.graph
    names, ids = graph.node_ids(), back.node_ids()
    row, column = np.nonzero(back.weights)
    found = {
        (ids[back.targets[at]], ids[up]): float(back.weights[at, up])
        for at, up in zip(row.tolist(), column.tolist(), strict=True)
    }
    edges = zip(kept.edges.tolist(), kept.weights.tolist(), strict=True)
    assert found == {(names[down], names[up]): weight for (down, up), weight in edges}
    # Their files have no shares: those within the file differ by the edges that pruning took.
    shares = {(names[down], names[up]): share for (down, up), share in _shares(kept)}
    for (down, up), share in _shares(viewed.kept):
        assert share == pytest.approx(shares[ids[down], ids[up]], rel=0.25)


def _shares(kept: Kept) -> Iterator[tuple[list[int], float]]:
    return zip(kept.edges.tolist(), kept.shares.tolist(), strict=True)


def _theirs(node: dict[str, Any]) -> str:
    """Their name of a node of ours: errors are 0_layer_position."""
    name = str(node["node_id"])
    return f"0_{node['layer']}_{node['ctx_idx']}" if "error" in node["feature_type"] else name


def _check_node(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key, value in theirs.items():
        if key == "node_id":
            continue
        if isinstance(value, float):
            assert ours[key] == pytest.approx(value, rel=1e-5), key
        else:
            assert ours[key] == value, key

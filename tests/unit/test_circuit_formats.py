"""Circuits in other tools' formats: round trips, what each number becomes, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node, read_circuit, write_circuit
from circuitflow.circuits.converting import convert_circuit, shape_of
from circuitflow.circuits.formats.feature_circuits import read_feature_circuits, write_feature_circuits
from circuitflow.circuits.formats.mib import Shape, read_mib, write_mib
from circuitflow.cli import app
from circuitflow.errors import UserError
from circuitflow.store.files import write_json
from circuitflow.store.objects import Manifest

SHAPE = Shape(n_layers=2, n_heads=2, d_model=4, d_head=2)
THEIRS = Path("resources/exchange/feature_circuits.py")


def mib_file(path, neurons=False):
    """What the benchmark's own Graph.to_json writes for a model of two layers."""
    nodes = {
        name: {"in_graph": name in ("input", "a0.h1", "m1"), "score": 0.5} for name in SHAPE.components()
    }
    nodes["logits"] = {"in_graph": True}
    if neurons:
        nodes["m1"] |= {"neurons": [True, False, True, False], "neurons_scores": [1.0, 0.0, -2.0, 0.0]}
    edges = {}
    for up, down in SHAPE.edges():
        for name in [f"{up}->{down}<{x}>" for x in "qkv"] if down[0] == "a" else [f"{up}->{down}"]:
            edges[name] = {"score": 0.25, "in_graph": name in ("input->m1", "m1->logits", "input->a0.h1<q>")}
    path.write_text(json.dumps({"cfg": SHAPE.as_cfg(), "nodes": nodes, "edges": edges}))
    return path


def test_a_mib_circuit_in_and_out_is_the_same_file(tmp_path):
    source = mib_file(tmp_path / "a.json", neurons=True)
    write_circuit(tmp_path / "ours.json", read_mib(source))
    write_mib(tmp_path / "b.json", read_circuit(tmp_path / "ours.json"))
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(source.read_text())


def changed_mib(path, neurons=False, nodes=None, edges=None):
    """A MIB file that was read, whose nodes or edges were changed, and that was written again; and the file."""
    source = mib_file(path / "a.json", neurons)
    before = read_mib(source)
    after = replace(
        before,
        nodes=tuple(nodes(before.nodes)) if nodes else before.nodes,
        edges=tuple(edges(before.edges)) if edges else before.edges,
    )
    write_circuit(path / "ours.json", after)
    write_mib(path / "b.json", read_circuit(path / "ours.json"))
    return json.loads(source.read_text()), json.loads((path / "b.json").read_text())


def test_changed_nodes_and_edges_are_written(tmp_path):
    """A new score of one, a whole component more, an edge less, one more, one of another weight."""

    def nodes(found):
        kept = [replace(node, score=-3.0) if node.id == "embed/error" else node for node in found]
        return [*kept, Node("mlp.0", "error", -1, 0.125)]

    def edges(found):
        (last,) = (edge for edge in found if edge.down == METRIC)
        return [replace(last, weight=7.0), Edge("embed/error", "mlp.0/error", 2.0)]

    old, new = changed_mib(tmp_path, nodes=nodes, edges=edges)
    expected = json.loads(json.dumps(old))
    expected["nodes"]["input"]["score"] = -3.0
    expected["nodes"]["m0"] = {"in_graph": True, "score": 0.125}
    expected["edges"]["m1->logits"] = {"score": 7.0, "in_graph": True}
    expected["edges"]["input->m0"] = {"score": 2.0, "in_graph": True}
    expected["edges"]["input->m1"] = {"score": 0.25, "in_graph": False}
    assert new == expected


def test_a_component_that_left_takes_its_edges_along(tmp_path):
    """Scores stay: the file knows them of components outside, too."""
    old, new = changed_mib(
        tmp_path,
        nodes=lambda found: [node for node in found if node.site != "z.0"],
    )
    expected = json.loads(json.dumps(old))
    expected["nodes"]["a0.h1"]["in_graph"] = False
    expected["edges"]["input->a0.h1<q>"]["in_graph"] = False
    assert new == expected


def test_changed_neurons_keep_what_the_file_says_of_the_others(tmp_path):
    def nodes(found):
        return [
            replace(node, score=9.0) if node.id == "mlp.1/0" else node
            for node in found
            if node.id != "mlp.1/2"
        ]

    old, new = changed_mib(tmp_path, neurons=True, nodes=nodes)
    assert new["nodes"]["m1"] == {
        "in_graph": True,
        "score": 0.5,
        "neurons": [True, False, False, False],
        "neurons_scores": [9.0, 0.0, -2.0, 0.0],
    }
    assert new["edges"] == old["edges"]
    (tmp_path / "whole").mkdir()
    whole = [Node("mlp.1", "error", -1, 4.0)]
    _, new = changed_mib(
        tmp_path / "whole",
        neurons=True,
        nodes=lambda found: [*(node for node in found if node.site != "mlp.1"), *whole],
    )
    assert new["nodes"]["m1"] == {"in_graph": True, "score": 4.0}


def test_a_change_that_contradicts_the_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"input->a0\.h1 was added to a circuit whose MIB file already tells"):
        changed_mib(tmp_path, edges=lambda found: [*found, Edge("embed/error", "z.0/2", 1.0)])
    with pytest.raises(UserError, match="whole heads"):
        changed_mib(tmp_path, nodes=lambda found: [node for node in found if node.id != "z.0/2"])
    with pytest.raises(UserError, match="input does not read m1"):
        changed_mib(tmp_path, edges=lambda found: [*found, Edge("mlp.1/error", "embed/error", 1.0)])
    with pytest.raises(UserError, match="no counterpart"):
        changed_mib(tmp_path, nodes=lambda found: [*found, Node("resid.0", "error", -1, 1.0)])
    assert not (tmp_path / "b.json").exists()
    circuit = read_mib(tmp_path / "a.json")
    write_mib(tmp_path / "b.json", circuit, SHAPE)
    with pytest.raises(UserError, match="was read from a MIB file of"):
        write_mib(tmp_path / "c.json", circuit, replace(SHAPE, n_layers=3))


def test_what_components_become(tmp_path):
    found = read_mib(mib_file(tmp_path / "a.json", neurons=True))
    assert found.sites == ("embed", "z.0", "mlp.0", "z.1", "mlp.1")
    assert [(node.id, node.score) for node in found.nodes] == [
        ("embed/error", 0.5),
        ("z.0/2", 0.25),
        ("z.0/3", 0.25),
        ("mlp.1/2", -2.0),
        ("mlp.1/0", 1.0),
    ]
    assert found.edges == ()  # their ends are coordinates here
    whole = read_mib(mib_file(tmp_path / "b.json"))
    assert {(edge.up, edge.down) for edge in whole.edges} == {
        ("embed/error", "mlp.1/error"),
        ("mlp.1/error", METRIC),
    }


def test_the_number_of_edges_is_that_of_the_benchmark():
    count = sum(3 if down[0] == "a" else 1 for _, down in Shape(12, 12, 768, 64).edges())
    assert count == 32491  # GPT-2 small
    first = [edge for edge in Shape(1, 2, 4, 2, parallel=True).edges() if edge[1] == "m0"]
    assert first == [("input", "m0")]


def test_our_coordinates_as_neurons_and_heads(tmp_path):
    nodes = (
        Node("embed", "error", -1, 0.5),
        Node("z.0", "feature", 2, 0.75),
        Node("z.0", "feature", 3, 0.25),
        Node("mlp.1", "feature", 1, -2.0),
    )
    edges = (Edge("embed/error", "mlp.1/1", 0.125), Edge("z.0/2", METRIC, 1.0), Edge("z.0/3", METRIC, 2.0))
    circuit = Circuit(("embed", "z.0", "mlp.1"), nodes, edges)
    write_mib(tmp_path / "a.json", circuit, SHAPE)
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 4}
    assert told["nodes"]["a0.h1"] == {"in_graph": True, "score": 1.0}
    assert told["nodes"]["m1"]["neurons"] == [False, True, False, False]
    assert told["nodes"]["m1"]["neurons_scores"] == [0, -2, 0, 0]
    assert {name for name, node in told["nodes"].items() if node["in_graph"]} == {
        "input",
        "a0.h1",
        "m1",
        "logits",
    }
    assert told["edges"]["a0.h1->logits"] == {"score": 3.0, "in_graph": True}
    assert told["edges"]["input->m1"] == {"score": 0.125, "in_graph": True}
    assert not told["edges"]["input->m0"]["in_graph"]
    again = read_mib(tmp_path / "a.json")
    assert {(node.id, node.score) for node in again.nodes} >= {("embed/error", 0.5), ("mlp.1/1", -2.0)}


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (Node("resid.0", "feature", 1, 1.0), "no counterpart"),
        (Node("mlp.0", "feature", 9, 1.0), "no counterpart"),
        (Node("mlp.0", "error", -1, 1.0, position=2), "no counterpart"),
        (Node("z.0", "feature", 2, 1.0), "whole heads"),
    ],
)
def test_what_mib_cannot_hold_is_refused(tmp_path, node, words):
    with pytest.raises(UserError, match=words):
        write_mib(tmp_path / "a.json", Circuit((node.site,), (node,), ()), SHAPE)
    assert not (tmp_path / "a.json").exists()


def test_damaged_mib_files_are_told_in_one_sentence(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"nodes": {}}')
    with pytest.raises(UserError, match="cfg, nodes and edges"):
        read_mib(path)
    value = json.loads(mib_file(path).read_text())
    path.write_text(json.dumps({**value, "nodes": {"a7.h0": {"in_graph": True}}}))
    with pytest.raises(UserError, match=r"'a7\.h0'"):
        read_mib(path)
    path.write_text(json.dumps({**value, "edges": {"m0->m9": {"score": 1, "in_graph": True}}}))
    with pytest.raises(UserError, match="'m0->m9'"):
        read_mib(path)


def toy_circuit():
    nodes = (
        Node("embed", "feature", 1, 0.5),
        Node("attn.0", "error", -1, -0.25),
        Node("resid.0", "feature", 2, 2.0),
        Node("resid.0", "error", -1, 1.0),
    )
    edges = (
        Edge("resid.0/2", METRIC, 2.0),
        Edge("embed/1", "attn.0/error", -0.5),
        Edge("attn.0/error", "resid.0/2", 0.25),
    )
    sizes = {"embed": 3, "attn.0": 4, "resid.0": 5}
    return Circuit(("embed", "attn.0", "resid.0"), nodes, edges, {"d_dict": sizes})


def test_feature_circuits_round_trip(tmp_path):
    circuit = toy_circuit()
    write_feature_circuits(tmp_path / "a.pt", circuit)
    told = torch.load(tmp_path / "a.pt", weights_only=True)
    assert told["nodes"]["resid_0"]["act"].tolist() == [0, 0, 2, 0, 0]
    assert told["nodes"]["attn_0"]["resc"].tolist() == [-0.25]
    assert told["edges"]["embed"]["attn_0"].shape == (5, 4)
    assert told["edges"]["embed"]["attn_0"].to_dense()[4, 1] == -0.5
    assert told["edges"]["resid_0"]["y"].to_dense().tolist() == [0, 0, 2, 0, 0, 0]
    again = read_feature_circuits(tmp_path / "a.pt")
    assert again.sites == circuit.sites
    assert again.nodes == circuit.nodes
    assert set(again.edges) == set(circuit.edges)


def test_thresholds_choose_as_their_figures_do(tmp_path):
    write_feature_circuits(tmp_path / "a.pt", toy_circuit())
    found = read_feature_circuits(tmp_path / "a.pt", node_threshold=0.3, edge_threshold=1.0)
    assert [node.id for node in found.nodes] == ["embed/1", "resid.0/2", "resid.0/error"]
    assert [(edge.up, edge.down) for edge in found.edges] == [("resid.0/2", METRIC)]


CLASS = """
class SparseAct:
    def __init__(self, act=None, res=None, resc=None):
        self.act, self.res, self.resc = act, res, resc
"""


def test_the_converter_runs_where_their_class_lives(tmp_path):
    """Their own pickles are refused here, and become plain, and back, by the script alone."""
    (tmp_path / "activation_utils.py").write_text(CLASS)
    write_feature_circuits(tmp_path / "plain.pt", toy_circuit())
    script = THEIRS.resolve()

    def convert(*arguments):
        command = [sys.executable, str(script), *arguments]
        environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)

    convert("from-plain", "plain.pt", "theirs.pt")
    with pytest.raises(UserError, match="more than plain tensors"):
        read_feature_circuits(tmp_path / "theirs.pt")
    convert("to-plain", "theirs.pt", "again.pt")
    assert read_feature_circuits(tmp_path / "again.pt").nodes == toy_circuit().nodes


def test_effects_by_position_and_foreign_places_are_refused(tmp_path):
    def saved(nodes):
        torch.save({"nodes": nodes, "edges": {}}, tmp_path / "a.pt")
        return tmp_path / "a.pt"

    with pytest.raises(UserError, match="aggregation sum"):
        read_feature_circuits(saved({"resid_0": {"act": torch.ones(6, 5), "resc": torch.ones(6, 1)}}))
    with pytest.raises(UserError, match="'head_0'"):
        read_feature_circuits(saved({"head_0": {"act": torch.ones(5), "resc": torch.ones(1)}}))
    with pytest.raises(UserError, match="without 'resc'"):
        read_feature_circuits(saved({"resid_0": {"act": torch.ones(5)}}))
    with pytest.raises(UserError, match="is not known"):
        write_feature_circuits(tmp_path / "b.pt", Circuit(("mlp.0",), (), ()))


def test_the_command_line(tmp_path):
    source = mib_file(tmp_path / "a.json")
    ours, back = tmp_path / "ours.json", tmp_path / "back.json"
    runner = CliRunner()
    first = runner.invoke(app, ["convert-circuit", str(source), str(ours), "--to", "circuitflow"])
    assert first.exit_code == 0, first.output
    assert "4 nodes and 2 edges" in first.output
    assert runner.invoke(app, ["convert-circuit", str(ours), str(back), "--to", "mib"]).exit_code == 0
    assert json.loads(back.read_text()) == json.loads(source.read_text())
    with pytest.raises(UserError, match="exists"):
        convert_circuit(source, ours, "circuitflow")
    with pytest.raises(UserError, match="did you mean 'mib'"):
        convert_circuit(source, tmp_path / "x", "mibb")


def test_shapes_of_models(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"n_layer": 3, "n_head": 4, "n_embd": 8, "model_type": "gpt2"})
    )
    assert shape_of(tmp_path) == Shape(3, 4, 8, 2)
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 3}))
    with pytest.raises(UserError, match="how many layers"):
        shape_of(tmp_path)


def put(*keys, value):
    def edit(found):
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("cfg", "n_layers", value=None), "n_layers None in its cfg"),
        (put("cfg", "n_layers", value="two"), "n_layers 'two' in its cfg"),
        (put("cfg", "n_heads", value=0), "n_heads 0 in its cfg"),
        (put("cfg", "n_heads", value=3), "do not tell the width of a head"),
        (put("cfg", "parallel_attn_mlp", value="no"), "takes true or false"),
        (put("nodes", "m1", value="in"), "at node 'm1' 'in'"),
        (put("edges", "m0->m1", value=True), "at edge 'm0->m1' True"),
        (put("edges", "m0->m1", "score", value="abc"), "score 'abc'; it takes a number"),
        (put("nodes", "m1", "score", value=[]), "takes a number"),
        (put("nodes", "m1", "in_graph", value="yes"), "in_graph 'yes'"),
        (put("nodes", "m1", "neurons", value=None), "not a list of true and false"),
        (put("nodes", "m1", "neurons_scores", value=[1.0]), "4 neurons but 1 neurons_scores"),
        (put("nodes", "m1", "neurons_scores", value=["a"] * 4), "not a list of numbers"),
        (put("edges", "m1->m0", value={"in_graph": True}), "m0 does not read m1"),
        (put("edges", value=[]), "it needs the keys cfg, nodes and edges"),
    ],
)
def test_malformed_mib_files_are_told_in_one_sentence(tmp_path, edit, words):
    source = mib_file(tmp_path / "a.json", neurons=True)
    value = json.loads(source.read_text())
    edit(value)
    source.write_text(json.dumps(value))
    with pytest.raises(UserError) as caught:
        convert_circuit(source, tmp_path / "b.json", "circuitflow", "mib")
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("nodes", "resid_0", "act", value=torch.tensor(1.0)), "a single number as 'act'"),
        (put("nodes", "resid_0", "act", value=torch.tensor([1.0, float("nan"), 0, 0])), "not numbers"),
        (put("nodes", "resid_0", "resc", value=torch.zeros(0)), "has 0 numbers as resc"),
        (put("nodes", 3, value={}), "names a place 3"),
        (put("edges", value=[]), "edges that are not"),
        (put("edges", "resid_0", value=3), "edges that are not"),
        (put("edges", "resid_0", value={"y": torch.full((5,), float("inf"))}), "not numbers"),
    ],
)
def test_malformed_feature_circuits_are_told_in_one_sentence(tmp_path, edit, words):
    parts = {"act": torch.ones(4), "resc": torch.ones(1)}
    value = {"examples": [], "nodes": {"resid_0": parts}, "edges": {"resid_0": {"y": torch.ones(5)}}}
    torch.save(value, tmp_path / "good.pt")
    assert len(read_feature_circuits(tmp_path / "good.pt").nodes) == 5
    edit(value)
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(UserError, match=words):
        convert_circuit(tmp_path / "a.pt", tmp_path / "b.json", "circuitflow")


def test_folders_and_thresholds_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder; name the circuit's file"):
        convert_circuit(tmp_path, tmp_path / "b.json", "mib")
    for thresholds, words in (((float("nan"), 0.0), "--nodes is nan"), ((0.0, -1.0), "--edges is -1")):
        source = mib_file(tmp_path / "a.json")
        with pytest.raises(UserError, match=words):
            convert_circuit(source, tmp_path / "b.json", "circuitflow", thresholds=thresholds)


def test_dictionaries_of_another_set_are_refused(tmp_path):
    circuit = Circuit(("resid.0",), (Node("resid.0", "feature", 7, 1.0),), ())
    with pytest.raises(UserError, match=r"resid\.0/7 does not exist in a dictionary of 4 features"):
        write_feature_circuits(tmp_path / "a.pt", circuit, {"resid.0": 4})
    write_circuit(tmp_path / "ours.json", replace(circuit, provenance={"dictionaries": {"resid.0": "abc"}}))
    write_json(tmp_path / "resid.0.json", {"content": "another", "kind": "dictionary", "object": "x"})
    with pytest.raises(UserError, match="is not the one that the circuit was made with"):
        convert_circuit(tmp_path / "ours.json", tmp_path / "b.pt", "feature-circuits", dictionaries=tmp_path)


def test_a_run_s_model_folder_tells_the_shape(tmp_path):
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 4}
    write_json(tmp_path / "m" / "objects" / "abc" / "hf" / "config.json", config)
    Manifest("model", "abc", "c", {}, {}).write(tmp_path / "m" / "model" / "manifest.json")
    assert shape_of(tmp_path / "m" / "model") == SHAPE
    assert shape_of(tmp_path / "m" / "model" / "manifest.json") == SHAPE
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"is no config\.json"):
        shape_of(tmp_path)

"""The circuit object: out and in again, as JSON and GraphML, equal circuits in equal bytes."""

import json
from dataclasses import replace

import networkx
import pytest

from circuitflow.circuits.circuit import (
    METRIC,
    Circuit,
    Edge,
    Node,
    read_circuit,
    without_path_to_metric,
    write_circuit,
    write_graphml,
)
from circuitflow.errors import UserError
from circuitflow.store.objects import content_of

NODES = (
    Node("resid.0", "feature", 4, 0.75),
    Node("resid.0", "error", -1, -0.5),
    Node("resid.3", "feature", 1, 0.1, position=2),
)
EDGES = (Edge("resid.0/4", "resid.3/1@2", -0.25), Edge("resid.3/1@2", METRIC, 0.1))


@pytest.fixture
def circuit() -> Circuit:
    return Circuit(
        ("resid.0", "resid.2", "resid.3"), NODES, EDGES, {"nodes": {"top": 3}}, {"score": "IE"}, {"seed": 1}
    )


def test_names_of_nodes():
    assert [node.id for node in NODES] == ["resid.0/4", "resid.0/error", "resid.3/1@2"]


def test_json_round_trip(circuit, tmp_path):
    write_circuit(tmp_path / "a.json", circuit)
    again = read_circuit(tmp_path / "a.json")
    assert again == circuit
    write_circuit(tmp_path / "b.json", again)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_content_is_what_the_circuit_says_not_how_it_was_made(circuit, tmp_path):
    variants = {
        "same": replace(circuit, provenance={"seed": 2}),
        "other": replace(circuit, edges=EDGES[:1]),
        "this": circuit,
    }
    for name, variant in variants.items():
        write_circuit(tmp_path / f"{name}.json", variant)
    same, other, this = (content_of(tmp_path / f"{name}.json") for name in variants)
    assert same == this != other


def test_the_nodes_of_a_site(circuit):
    assert circuit.at("resid.0") == NODES[:2]
    assert circuit.at("resid.2") == ()


@pytest.mark.parametrize("value", [{}, [], {"format": "circuitflow.circuit.9"}])
def test_other_json_is_refused(value, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="is not a circuit"):
        read_circuit(tmp_path / "c.json")


def test_graphml_round_trip(circuit, tmp_path):
    for name in ("a", "b"):
        write_graphml(tmp_path / f"{name}.graphml", circuit)
    graph = networkx.read_graphml(tmp_path / "a.graphml")
    assert set(graph.nodes) == {node.id for node in NODES} | {METRIC}
    assert graph.nodes["resid.0/error"]["kind"] == "error"
    assert graph.nodes["resid.0/4"]["score"] == 0.75
    assert graph.edges["resid.0/4", "resid.3/1@2"]["weight"] == -0.25
    assert graph.edges["resid.0/4", "resid.3/1@2"]["magnitude"] == 0.25
    assert (tmp_path / "a.graphml").read_bytes() == (tmp_path / "b.graphml").read_bytes()


def test_nodes_without_a_path_to_the_metric():
    assert without_path_to_metric(NODES, EDGES) == ["resid.0/error"]
    assert without_path_to_metric(NODES, EDGES[:1]) == [node.id for node in NODES]
    loop = (*EDGES, Edge("resid.3/1@2", "resid.0/4", 1.0))
    assert without_path_to_metric(NODES, loop) == ["resid.0/error"]

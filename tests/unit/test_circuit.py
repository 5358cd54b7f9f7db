"""The circuit object: out and in again, as JSON and GraphML, equal circuits in equal bytes."""

import json
import re
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
    write_dot,
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


STRING = r'"((?:[^"\\]|\\.)*)"'
STATEMENT = re.compile(rf"^{STRING}(?: -> {STRING})? \[((?:\w+={STRING}(?:, )?)*)\];$")
OTHER = (
    r"digraph circuit \{",
    r"rankdir=BT;",
    r"node \[.*\];",
    rf"subgraph {STRING} \{{",
    r"rank=same;",
    r"\}",
)


def plain(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def read_dot(text: str) -> networkx.DiGraph:
    """A strict reader of what is written here: every line is a node, an edge, or one of a few known others."""
    graph = networkx.DiGraph()
    for line in map(str.strip, text.splitlines()):
        found = STATEMENT.match(line)
        if found is None:
            assert any(re.fullmatch(known, line) for known in OTHER), line
            continue
        up, down, looks = found[1], found[2], found[3]
        values = {name: plain(value) for name, value in re.findall(rf"(\w+)={STRING}", looks)}
        if down is None:
            graph.add_node(plain(up), **values)
        else:
            assert plain(up) in graph
            assert plain(down) in graph
            graph.add_edge(plain(up), plain(down), **values)
    assert text.count("{") - text.count("}") == sum(
        str(value).count("{") - str(value).count("}")
        for *_, data in graph.nodes(data=True)
        for value in data.values()
    )
    return graph


def test_dot_holds_the_whole_circuit(circuit, tmp_path):
    odd = 'say "a\\b"\nover {'
    for name in ("a", "b"):
        write_dot(tmp_path / f"{name}.dot", circuit, {"resid.0/4": odd})
    text = (tmp_path / "a.dot").read_text()
    assert text == (tmp_path / "b.dot").read_text()
    graph = read_dot(text)
    assert set(graph.nodes) == {node.id for node in NODES} | {METRIC}
    assert set(graph.edges) == {(edge.up, edge.down) for edge in EDGES}
    for node in NODES:
        seen = graph.nodes[node.id]
        assert float(seen["score"]) == node.score
        assert seen["shape"] == ("triangle" if node.kind == "error" else "box")
        assert seen.get("position") == (None if node.position is None else str(node.position))
    assert graph.nodes["resid.0/4"]["label"] == f"resid.0/4\n+0.75\n{odd}"
    for edge in EDGES:
        assert float(graph.edges[edge.up, edge.down]["effect"]) == edge.weight
    wide, thin = (float(graph.edges[edge.up, edge.down]["penwidth"]) for edge in EDGES)
    assert wide == 5
    assert thin == pytest.approx(0.5 + 4.5 * 0.4**0.5, abs=0.01)
    colours = [graph.edges[edge.up, edge.down]["color"] for edge in EDGES]
    assert colours == ["#b2182b", "#2166ac"]


def test_dot_ranks_the_nodes_of_a_site_together(circuit, tmp_path):
    write_dot(tmp_path / "a.dot", circuit)
    groups = re.findall(r'subgraph "rank (\S+)" \{\n(.*?)\n  \}', (tmp_path / "a.dot").read_text(), re.DOTALL)
    assert [site for site, _ in groups] == ["resid.0", "resid.3"]
    assert ['"resid.0/4"' in body and '"resid.0/error"' in body for _, body in groups] == [True, False]


def test_nodes_without_a_path_to_the_metric():
    assert without_path_to_metric(NODES, EDGES) == ["resid.0/error"]
    assert without_path_to_metric(NODES, EDGES[:1]) == [node.id for node in NODES]
    loop = (*EDGES, Edge("resid.3/1@2", "resid.0/4", 1.0))
    assert without_path_to_metric(NODES, loop) == ["resid.0/error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.pop("provenance"), "'provenance'"),
        (lambda said: said["nodes"].append(said["nodes"][0]), "a node is listed twice"),
        (
            lambda said: said["edges"].append({"up": "resid.9/1", "down": "metric", "weight": 1.0}),
            "resid.9/1",
        ),
        (lambda said: said["nodes"][0].update(score="high"), "damaged or was edited"),
        (lambda said: said["nodes"][0].update(score=float("nan")), "not a number"),
    ],
)
def test_a_damaged_circuit_ends_with_one_sentence(tmp_path, change, message):
    path = tmp_path / "circuit.json"
    write_circuit(path, Circuit(("resid.0",), (Node("resid.0", "feature", 1, 0.5),), ()))
    said = json.loads(path.read_text(encoding="utf-8"))
    change(said)
    path.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_circuit(path)

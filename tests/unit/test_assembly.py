"""Assembling a circuit: which nodes and edges pass, in what order, and what is noted of the rest."""

import networkx
import numpy as np
import pytest

from circuitflow.circuits.assembly import assemble_circuit
from circuitflow.circuits.circuit import METRIC, read_circuit
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import write_table

SITES = ["resid.0", "resid.1", "resid.2"]
SCORES = {  # site → feature: score on train; −1 is the error
    "resid.0": {7: -4.0, 1: 2.0, 3: 0.5, -1: 0.25},
    "resid.1": {-1: 3.0, 2: 1.0, 5: -0.125},
    "resid.2": {4: 2.0, -1: -1.5, 9: 0.0},
}
WEIGHTS = {
    ("resid.0", 7, 2): 0.5, ("resid.0", 7, -1): -3.0, ("resid.0", 1, -1): 0.75, ("resid.0", -1, 2): 9.0,
    ("resid.0", 7, -2): 99.0, ("resid.1", 2, 4): -0.5, ("resid.1", -1, 4): 1.0, ("resid.1", -1, -1): 0.0,
}  # fmt: skip


def kind(feature: int) -> str:
    return {-1: "error", -2: "rest"}.get(feature, "feature")


@pytest.fixture
def assemble(tmp_path):
    """Runs the stage on small tables; gives the circuit."""
    rows = [
        (site, kind(feature), feature, rank, score)
        for site, scores in SCORES.items()
        for rank, (feature, score) in enumerate(sorted(scores.items(), key=lambda item: -abs(item[1])), 1)
    ]
    names = ("site", "kind", "feature", "rank", "score_train")
    write_table(tmp_path / "nodes.parquet", dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    tables = []
    for up in SITES[:2]:
        edges = [(u, d, weight) for (site, u, d), weight in WEIGHTS.items() if site == up]
        tables.append(tmp_path / f"{up}.parquet")
        columns = {
            "up_kind": [kind(e[0]) for e in edges],
            "up_feature": [e[0] for e in edges],
            "down_kind": [kind(e[1]) for e in edges],
            "down_feature": [e[1] for e in edges],
            "weight": [e[2] for e in edges],
        }
        down = SITES[SITES.index(up) + 1]
        write_table(tables[-1], columns, {"params": {"up": up, "down": down}})

    def run(nodes, edges, sites=SITES, pool=48, tables=tables):
        files = {"circuit": tmp_path / "circuit.json", "graphml": tmp_path / "circuit.graphml"}
        params = {"sites": sites, "nodes": nodes, "edges": edges, "pool": pool, "model": "toy", "task": "t"}
        inputs = {"nodes": tmp_path / "nodes.parquet", "edges": tables}
        assemble_circuit(inputs, params, Output(tmp_path, files, {"stage": "assemble_circuit"}))
        return read_circuit(files["circuit"])

    return run


def names(items) -> list:
    return [item.id if hasattr(item, "id") else (item.up, item.down) for item in items]


def test_top_nodes_are_taken_over_all_sites_by_size(assemble):
    circuit = assemble({"top": 5}, {"top": 100})
    assert names(circuit.nodes) == ["resid.0/7", "resid.0/1", "resid.1/error", "resid.2/4", "resid.2/error"]
    assert [node.score for node in circuit.nodes] == [-4.0, 2.0, 3.0, 2.0, -1.5]


def test_a_threshold_is_on_the_size_and_exclusive(assemble):
    circuit = assemble({"threshold": 1.0}, {"threshold": 0.75})
    assert "resid.1/2" not in names(circuit.nodes)
    assert names(circuit.edges) == [
        ("resid.0/7", "resid.1/error"),
        ("resid.2/4", METRIC),
        ("resid.2/error", METRIC),
        ("resid.1/error", "resid.2/4"),
    ]


def test_edges_join_chosen_nodes_of_neighbouring_sites_only(assemble):
    circuit = assemble({"top": 6}, {"top": 100})
    chosen = set(names(circuit.nodes)) | {METRIC}
    assert all({edge.up, edge.down} <= chosen for edge in circuit.edges)
    assert ("resid.0/error", "resid.1/2") not in names(circuit.edges)
    sizes = [abs(edge.weight) for edge in circuit.edges]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) > 0


def test_nodes_of_the_last_site_always_lead_to_the_metric_with_their_score(assemble):
    for top in (0, 99):
        ends = {
            edge.up: edge.weight for edge in assemble({"top": 9}, {"top": top}).edges if edge.down == METRIC
        }
        assert ends == {"resid.2/4": 2.0, "resid.2/error": -1.5}
    assert len(assemble({"top": 6}, {"top": 1}).edges) == 3


def test_what_was_left_out_is_noted(assemble):
    circuit = assemble({"top": 2}, {"top": 5})
    assert circuit.selection["without_path_to_metric"] == ["resid.0/7", "resid.1/error"]
    assert circuit.selection["possible_edges"] == 1
    assert circuit.selection["smallest_score"] == 3.0
    assert circuit.selection["passing_outside_pool"] == 0
    assert circuit.conventions["score"].startswith("IE")
    assert circuit.provenance == {"stage": "assemble_circuit", "model": "toy", "task": "t"}


def test_only_the_pool_is_a_candidate_and_the_rest_is_counted(assemble):
    circuit = assemble({"top": 5}, {"top": 5}, pool=1)
    assert "resid.0/1" not in names(circuit.nodes)
    assert circuit.selection["passing_outside_pool"] == 1


def test_nodes_without_effect_never_pass(assemble):
    assert "resid.2/9" not in names(assemble({"top": 100}, {"top": 5}).nodes)


def test_one_site_has_edges_into_the_metric_only(assemble):
    circuit = assemble({"top": 2}, {"top": 9}, sites=["resid.0"], tables=[])
    assert names(circuit.edges) == [("resid.0/7", METRIC), ("resid.0/1", METRIC)]


def test_an_empty_circuit_is_refused(assemble):
    with pytest.raises(UserError, match=r"No node passes circuit.nodes .* largest \|score\| is 4"):
        assemble({"threshold": 5.0}, {"top": 1})


def test_graphml_has_the_same_graph(assemble, tmp_path):
    circuit = assemble({"top": 6}, {"top": 100})
    graph = networkx.read_graphml(tmp_path / "circuit.graphml")
    assert graph.number_of_edges() == len(circuit.edges)
    assert np.isclose(graph.edges["resid.0/7", "resid.1/error"]["weight"], -3)

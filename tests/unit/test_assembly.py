"""Assembling a circuit: which nodes and edges pass, in what order, and what is noted of the rest."""

import networkx
import numpy as np
import pytest

from circuitflow.circuits.assembly import assemble_circuit
from circuitflow.circuits.circuit import METRIC, read_circuit
from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import write_table
from tests.fixtures.attribution_toy import toy_dictionary

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
    return {-1: "error", -2: "rest", -3: "metric"}.get(feature, "feature")


COLUMNS = (
    "up_site", "up_kind", "up_feature", "up_position", "down_kind", "down_feature", "down_position", "weight",
    "up_effect",
)  # fmt: skip


def edge_table(path, down, edges):
    """A table of score_edges; ``edges`` are (upstream site, upstream feature, downstream feature, weight)."""
    rows = [(site, kind(u), u, -1, kind(d), d, -1, weight, SCORES[site][u]) for site, u, d, weight in edges]
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    write_table(path, columns, {"params": {"down": down}})


@pytest.fixture
def assemble(tmp_path):
    """Runs the stage on small tables; gives the circuit."""
    rows = [
        (site, kind(feature), feature, -1, rank, score)
        for site, scores in SCORES.items()
        for rank, (feature, score) in enumerate(sorted(scores.items(), key=lambda item: -abs(item[1])), 1)
    ]
    names = ("site", "kind", "feature", "position", "rank", "score_train")
    write_table(tmp_path / "nodes.parquet", dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    tables = [tmp_path / f"{down}.parquet" for down in (*SITES[1:], "metric")]
    for up, down, path in zip(SITES, (*SITES[1:], "metric"), tables, strict=True):
        edges = [(site, u, d, weight) for (site, u, d), weight in WEIGHTS.items() if site == up]
        if down == "metric":
            edges = [(up, feature, -3, score) for feature, score in SCORES[up].items()]
        edge_table(path, down, edges)
    dictionaries = []
    for site in SITES:
        dictionaries.append(tmp_path / f"{site}.safetensors")
        save_dictionary(dictionaries[-1], toy_dictionary(site, 4, d_dict=16))

    def run(nodes, edges, sites=SITES, pool=48, tables=tables, **changed):
        files = {name: tmp_path / f"circuit.{name}" for name in ("circuit", "graphml", "dot")}
        params = {
            "sites": sites,
            "nodes": nodes,
            "edges": edges,
            "pool": pool,
            "ranking": "absolute",
            "prune": "none",
            "max_nodes": None,
            "model": "toy",
            "task": "t",
        }
        inputs = {
            "nodes": tmp_path / "nodes.parquet",
            "edges": tables,
            "search": [tmp_path / "search.parquet"],
        }
        inputs["dictionaries"] = dictionaries[: len(sites)]
        assemble_circuit(
            inputs, {**params, **changed}, Output(tmp_path, files, {"stage": "assemble_circuit"})
        )
        return read_circuit(files["circuit"])

    run.folder, run.tables = tmp_path, tables
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
    made = circuit.provenance["dictionaries"]
    assert {**circuit.provenance, "dictionaries": None} == {
        "stage": "assemble_circuit", "model": "toy", "task": "t", "dictionaries": None,
    }  # fmt: skip
    assert list(made) == SITES
    assert len(set(made.values())) == 3


def test_only_the_pool_is_a_candidate_and_the_rest_is_counted(assemble):
    circuit = assemble({"top": 5}, {"top": 5}, pool=1)
    assert "resid.0/1" not in names(circuit.nodes)
    assert circuit.selection["passing_outside_pool"] == 1


def test_nodes_without_effect_never_pass(assemble):
    assert "resid.2/9" not in names(assemble({"top": 100}, {"top": 5}).nodes)


def test_one_site_has_edges_into_the_metric_only(assemble):
    circuit = assemble({"top": 2}, {"top": 9}, sites=["resid.2"], tables=assemble.tables[2:])
    assert names(circuit.edges) == [("resid.2/4", METRIC), ("resid.2/error", METRIC)]


def test_an_empty_circuit_is_refused(assemble):
    with pytest.raises(UserError, match=r"No node passes circuit.nodes .* strongest has 4"):
        assemble({"threshold": 5.0}, {"top": 1})


def test_signed_circuits_hold_what_supports_the_right_answer(assemble):
    circuit = assemble({"top": 4}, {"top": 100}, ranking="signed")
    assert names(circuit.nodes) == ["resid.0/1", "resid.1/error", "resid.1/2", "resid.2/4"]


def test_sparsity_is_a_share_of_all_nodes(assemble):
    """3 sites of 16 features and an error: 51 nodes, of which 90 % are left out."""
    circuit = assemble({"sparsity": 0.9}, {"top": 100})
    assert circuit.selection["total_nodes"] == 51
    assert len(circuit.nodes) == 5


def test_a_wanted_faithfulness_takes_the_searched_number(assemble):
    table = {"nodes": [2, 3, 4], "chosen": [False, True, False]}
    write_table(assemble.folder / "search.parquet", table)
    assert len(assemble({"faithfulness": 0.8}, {"top": 100}).nodes) == 3


def test_pruning_leaves_nodes_on_paths_to_the_metric(assemble):
    circuit = assemble({"top": 6}, {"threshold": 0.9}, prune="sink_backwards", max_nodes=4)
    assert circuit.selection["without_path_to_metric"] == []
    assert circuit.selection["pruned"] == ["resid.0/1", "resid.1/2"]
    assert names(circuit.nodes) == ["resid.0/7", "resid.1/error", "resid.2/4", "resid.2/error"]


def test_pruning_everything_is_refused(assemble):
    with pytest.raises(
        UserError, match=r"circuit\.prune is sink_backwards, after which none of 2 nodes is left"
    ):
        assemble({"top": 2}, {"top": 1}, prune="sink_backwards")


def test_conservation_is_checked_over_all_tables(assemble):
    """Of resid.0, feature 7 passes on 0.5 − 3 + 99 of its −4; resid.2 leads to the metric alone, all of it."""
    found = assemble({"top": 6}, {"top": 1}).selection["conservation"]
    assert found["resid.0"]["residual"] == pytest.approx(100.5)
    assert found["resid.2"] == {"residual": 0.0, "relative": 0.0}


def test_nodes_keep_their_positions(assemble, tmp_path):
    rows = {"site": "resid.0", "kind": "feature", "feature": 7, "rank": 1}
    columns = {name: [value] * 2 for name, value in rows.items()}
    write_table(tmp_path / "nodes.parquet", {**columns, "position": [3, 5], "score_train": [1.0, -2.0]})
    circuit = assemble({"top": 2}, {"top": 1}, sites=["resid.0"], tables=[])
    assert names(circuit.nodes) == ["resid.0/7@5", "resid.0/7@3"]


def test_graphml_has_the_same_graph(assemble, tmp_path):
    circuit = assemble({"top": 6}, {"top": 100})
    graph = networkx.read_graphml(tmp_path / "circuit.graphml")
    assert graph.number_of_edges() == len(circuit.edges)
    assert np.isclose(graph.edges["resid.0/7", "resid.1/error"]["weight"], -3)

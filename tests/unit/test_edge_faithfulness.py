"""The stage evaluate_edges: its sets of edges, its table, its resume and what it does not do twice."""

import numpy as np
import pytest
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits import edge_faithfulness
from circuitflow.circuits import evaluation as engine
from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node, write_circuit
from circuitflow.circuits.edge_faithfulness import edge_sets, evaluate_edges
from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.jobs import Output
from circuitflow.store.tables import read_provenance, read_table, write_table
from tests.fixtures.attribution_toy import (
    cached_sites,
    metric_with,
    toy_dictionary,
    toy_pairs,
    write_gradients,
)

SITES = ("embed", "resid.0", "resid.1")
D_DICT = 24


def toy_circuit() -> Circuit:
    """Six features of every site and the last error; one edge of its own for every node and the metric."""
    nodes = [Node(site, "feature", feature, 1.0 + feature) for site in SITES for feature in range(6)]
    nodes.append(Node("resid.1", "error", ERROR, 0.5))
    into = [Edge(f"resid.1/{feature}", METRIC, 0.1) for feature in range(6)]
    return Circuit(SITES, tuple(nodes), tuple(into))


def write_edges(folder, circuit) -> list:
    """Tables of edges between all nodes of neighbouring sites, as score_edges writes them; weights are random."""
    paths, generator = [], np.random.default_rng(0)
    for up, down in (("embed", "resid.0"), ("resid.0", "resid.1"), ("resid.1", METRIC)):
        ends = (
            [("metric", -3)] if down == METRIC else [(node.kind, node.feature) for node in circuit.at(down)]
        )
        rows = [(node.feature, kind, feature) for node in circuit.at(up) for kind, feature in ends]
        size = len(rows)
        columns = {
            "up_site": [up] * size,
            "up_feature": [one[0] for one in rows],
            "up_position": [SUMMED] * size,
            "down_kind": [one[1] for one in rows],
            "down_feature": [one[2] for one in rows],
            "down_position": [SUMMED] * size,
            "weight": generator.normal(size=size),
        }
        paths.append(folder / f"{down}.parquet")
        write_table(paths[-1], columns, {"params": {"down": down}})
    return paths


@pytest.fixture
def stage(random_lm, tmp_path, monkeypatch):
    exact, lm = random_lm("llama"), random_lm("llama", "float32")
    splits = {"train": toy_pairs(12, seed=1), "test": toy_pairs(6, seed=2)}
    monkeypatch.setattr(engine, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(engine, "load_token_pairs", splits.__getitem__)
    inputs = {"model": tmp_path, "tokens_train": "train", "tokens_test": "test", "dictionaries": []}
    for split, pairs in splits.items():
        cached, metric = cached_sites(exact, pairs, SITES), {"clean": metric_with(exact, pairs).numpy()}
        inputs[f"gradients_{split}"] = write_gradients(tmp_path, split, cached, metric)
    for seed, site in enumerate(SITES):
        inputs["dictionaries"].append(tmp_path / f"{site}.safetensors")
        save_dictionary(
            inputs["dictionaries"][-1], toy_dictionary(site, 16, D_DICT, seed=seed).to(torch.float32)
        )
    inputs["circuit"] = tmp_path / "circuit.json"
    write_circuit(inputs["circuit"], toy_circuit())
    inputs["edges"] = write_edges(tmp_path, toy_circuit())
    params = {
        "sites": list(SITES),
        "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
        "counts": [5, 20, 900],
        "random_counts": [20],
        "random_draws": 2,
        "pairs": 4,
        "ablation": "mean",
        "aggregate": "ratio_of_means",
        "bootstrap": 50,
        "seed": 0,
        "batch_rows": 9,
        "dtype": "float32",
        "compute": {"device": "cpu"},
    }

    def compute(folder="evaluation", **changed):
        place = tmp_path / folder
        place.mkdir(exist_ok=True, parents=True)
        said = {"stage": "evaluate_edges", "inputs": {"model": "m"}}
        path = place / "edge_faithfulness.parquet"
        evaluate_edges(inputs, {**params, **changed}, Output(place, {"edge_faithfulness": path}, said))
        return path

    return compute


def test_the_table_runs_from_nothing_to_the_circuits_nodes(stage):
    path = stage()
    table = read_table(path)
    main = {name: column[table["main"]] for name, column in table.items()}
    assert [
        (row[0], row[1], row[2]) for row in zip(main["series"], main["source"], main["edges"], strict=True)
    ] == [
        ("circuit", "none", 0),
        ("circuit", "count", 5),
        ("circuit", "count", 20),
        ("circuit", "all", 36 + 42 + 7),
        ("circuit", "assembled", 6),
        ("random", "draw", 20),
        ("random", "draw", 20),
        ("nodes", "assembled", -1),
    ]
    assert main["F"][0] == 0
    assert main["m_circuit"][3] == pytest.approx(main["m_circuit"][-1], abs=1e-4)
    assert main["nodes"].tolist()[3:5] == [19, 6]
    assert set(table["aggregate"]) == {"ratio_of_means", "mean_of_ratios"}
    assert (main["low"] <= main["high"]).all()
    assert read_provenance(path)["possible_edges"] == 85


def test_the_metric_kl_has_its_reference(stage):
    table = read_table(stage(metric={"kind": "kl", "wrong_answers": "max"}))
    assert table["m_circuit"][3] == pytest.approx(table["m_circuit"][7], abs=1e-4)
    assert (table["m_circuit"] > 0).all()


def test_a_killed_stage_goes_on_and_gives_the_same_bytes(stage, monkeypatch, tmp_path):
    run_edges, calls = edge_faithfulness.run_edges, []

    def failing(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args)
        return run_edges(*args)

    monkeypatch.setattr(edge_faithfulness, "run_edges", failing)
    with pytest.raises(KeyboardInterrupt):
        stage("killed")
    monkeypatch.setattr(edge_faithfulness, "run_edges", lambda *args: calls.append(args) or run_edges(*args))
    resumed = stage("killed").read_bytes()
    assert len(calls) == 7  # three before, four after
    assert resumed == stage("whole").read_bytes()
    assert not list((tmp_path / "killed").glob("*.jsonl"))


def test_one_more_count_runs_that_alone(stage, monkeypatch):
    run_edges, calls = edge_faithfulness.run_edges, []
    monkeypatch.setattr(edge_faithfulness, "run_edges", lambda *args: calls.append(args) or run_edges(*args))
    stage("results/m/objects/first")
    assert len(calls) == 7
    stage("results/m/objects/second", counts=[5, 20, 30, 900])
    assert len(calls) == 8
    stage("results/m/objects/third", ablation="zero")
    assert len(calls) == 15


def test_random_edges_are_matched_by_their_sites():
    weights = {("embed", "resid.0"): 1.0, ("resid.0", "resid.1"): 2.0, ("resid.1", METRIC): 3.0}
    possible = [
        Edge(f"{up}/{number}", down if down == METRIC else f"{down}/{number}", weight + number / 10)
        for (up, down), weight in weights.items()
        for number in range(5)
    ]
    params = {"counts": [7], "random_counts": [7], "random_draws": 60, "seed": 0}
    found = edge_sets(toy_circuit(), possible, params)
    assert [(one.source, len(one.edges)) for one in found[:3]] == [
        ("count", 7),
        ("all", 15),
        ("assembled", 6),
    ]
    assert found[0].threshold == pytest.approx(2.3)
    assert {edge.down for edge in found[0].edges if edge.weight > 3} == {METRIC}
    for one in found[3:]:
        ups = [edge.up.partition("/")[0] for edge in one.edges]
        assert [ups.count(site) for site in SITES] == [0, 2, 5]
    assert len({one.edges for one in found[3:]}) == 10  # two of five

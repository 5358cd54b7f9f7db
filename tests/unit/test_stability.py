"""Bootstrap stability of nodes and edges on tables whose answer is known."""

import math

import numpy as np
import pytest

from circuitflow.attribution.nodes import kinds
from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node, write_circuit
from circuitflow.circuits.stability import (
    candidate_edges,
    circuit_stability,
    edge_stability,
    node_stability,
    read_effects,
)
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_table, write_table

SITES = ["resid.0", "resid.1"]
EFFECTS = {  # site → node (feature, position) → effect in pairs 10, 11, 12, 13
    "resid.0": {(3, -1): [4, 4, 4, 4], (5, -1): [1, -1, 1, 1], (-1, -1): [0, 0, 0, 8]},
    "resid.1": {(3, -1): [-3, -3, -3, -3], (7, -1): [0.5, 0.5, 0.5, 0.5]},
}
R3, R5, RE = (
    Node("resid.0", kind, f, s)
    for kind, f, s in [("feature", 3, 4.0), ("feature", 5, 0.5), ("error", -1, 2.0)]
)
S3 = Node("resid.1", "feature", 3, -3.0)


def write_pairs(path, effects):
    rows = [
        ("train", 10 + number, *node, effect)
        for node, values in effects.items()
        for number, effect in enumerate(values)
        if effect
    ]
    rows.append(("test", 99, 3, -1, 1000.0))
    split, pair, feature, position, score = map(list, zip(*rows, strict=True))
    columns = {"split": split, "pair": pair, "kind": kinds(np.array(feature)), "feature": feature}
    write_table(path, {**columns, "position": position, "score": np.array(score, float)})
    return path


@pytest.fixture
def pairs(tmp_path):
    return [write_pairs(tmp_path / f"{site}.pairs.parquet", EFFECTS[site]) for site in SITES]


def write_edges(folder, down, rows, draws):
    """``rows``: (up_site, up_feature, down_feature, weight); ``draws`` (draws, rows)."""
    up_site, up, into, weight = map(list, zip(*rows, strict=True))
    columns = {
        "up_site": up_site,
        "up_kind": kinds(np.array(up)),
        "up_feature": up,
        "up_position": [-1] * len(up),
        "down_kind": kinds(np.array(into)),
        "down_feature": into,
        "down_position": [-1] * len(up),
        "weight": np.array(weight, float),
    }
    paths = folder / f"{down}.parquet", folder / f"{down}.draws.parquet"
    write_table(paths[0], columns, {"params": {"down": down}})
    write_table(paths[1], {f"d{i}": np.array(draw, np.float32) for i, draw in enumerate(draws)})
    return paths


def by_node(table) -> dict:
    names = zip(table["site"], table["feature"].tolist(), strict=True)
    return {f"{site}/{feature}": row for row, (site, feature) in enumerate(names)}


def test_effects_are_averaged_over_all_pairs_of_any_site(pairs):
    effects = read_effects(SITES, pairs)
    assert effects.pairs == 4
    assert effects.nodes["site"].tolist() == ["resid.0"] * 3 + ["resid.1"] * 2
    assert effects.nodes["feature"].tolist() == [-1, 3, 5, 3, 7]
    assert effects.mean().tolist() == [2, 4, 0.5, -3, 0.5]
    assert effects.mean(np.array([3.0, 0, 0, 1])).tolist() == [2, 4, 1, -3, 0.5]


def test_positions_are_nodes_of_their_own(tmp_path):
    path = write_pairs(tmp_path / "p.parquet", {(3, 0): [1, 1], (3, 4): [2, 2], (-1, 4): [3, 3]})
    effects = read_effects(["resid.0"], [path])
    assert effects.nodes["feature"].tolist() == [-1, 3, 3]
    assert effects.nodes["position"].tolist() == [4, 0, 4]
    assert effects.mean().tolist() == [3, 1, 2]


def test_a_node_of_one_pair_is_as_stable_as_that_pair_is_drawn(pairs):
    """The error has 8 in one of four pairs: it is among the top 2 when that is drawn at least twice (4 against 3)."""
    found = node_stability(read_effects(SITES, pairs), {"top": 2}, "absolute", 10, 4000, seed=0)
    row = by_node(found)
    assert found["selected"][row["resid.0/3"]] == 1
    twice = 1 - 0.75**4 - 4 * 0.25 * 0.75**3
    assert found["selected"][row["resid.0/-1"]] == pytest.approx(twice, abs=0.03)
    assert found["selected"][row["resid.1/3"]] == pytest.approx(1 - twice, abs=0.03)
    assert found["passes"].tolist() == [False, True, False, True, False]
    assert found["sign_stability"][row["resid.0/3"]] == found["sign_stability"][row["resid.1/3"]] == 1
    assert found["sign_stability"][row["resid.0/-1"]] == pytest.approx(1 - 0.75**4, abs=0.03)
    # of four draws, feature 5 is above 0 unless its one negative pair is drawn twice or more
    assert found["sign_stability"][row["resid.0/5"]] == pytest.approx(1 - twice, abs=0.03)
    assert (found["low"][row["resid.0/3"]], found["high"][row["resid.0/3"]]) == (4, 4)
    assert found["low"][row["resid.0/-1"]] == 0
    assert found["high"][row["resid.0/-1"]] == 6
    again = node_stability(read_effects(SITES, pairs), {"top": 2}, "absolute", 10, 4000, seed=0)
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_pool_and_ranking_are_applied_in_every_draw(pairs):
    effects = read_effects(SITES, pairs)
    signed = node_stability(effects, {"top": 3}, "signed", 10, 50, seed=0)
    assert signed["selected"][by_node(signed)["resid.1/3"]] < 0.5
    pooled = node_stability(effects, {"top": 9}, "absolute", 1, 50, seed=0)
    row = by_node(pooled)
    assert pooled["selected"][row["resid.0/5"]] == pooled["selected"][row["resid.1/7"]] == 0
    drawn = pooled["selected"][
        row["resid.0/-1"]
    ]  # errors are outside the pool, but without effect no candidates
    assert 0.5 < drawn < 1


def test_scores_without_single_pairs_are_refused(tmp_path):
    columns = {"split": ["test"], "pair": [1], "kind": ["feature"], "feature": [1], "position": [-1]}
    write_table(tmp_path / "p.parquet", {**columns, "score": [1.0]})
    with pytest.raises(UserError, match=r"no effects of single training pairs at resid.0.*decoder_only"):
        read_effects(["resid.0"], [tmp_path / "p.parquet"])


def test_edges_by_hand(tmp_path):
    rows = [
        ("resid.0", 3, 3, -4.0),
        ("resid.0", 5, 3, 2.0),
        ("resid.0", -1, 3, 1.0),
        ("resid.0", 3, -2, 50.0),  # the rest is no node
        ("resid.0", 9, 3, 60.0),  # not in the circuit
        ("resid.0", 3, 7, 0.0),
    ]
    draws = [[-4, 2, 1, 0, 0, 0], [-4, 0.5, 1, 0, 0, 0], [-4, -3, 1, 0, 0, 0], [-4, 2, 6, 0, 0, 0]]
    table = candidate_edges(*write_edges(tmp_path, "resid.1", rows, draws), [R3, R5, RE, S3])
    found = edge_stability([table], {"top": 2}, "absolute")
    assert found["up"].tolist() == ["resid.0/3", "resid.0/5", "resid.0/error"]
    assert found["down"].tolist() == ["resid.1/3"] * 3
    assert found["passes"].tolist() == [True, True, False]
    assert found["selected"].tolist() == [1, 0.5, 0.5]
    assert found["sign_stability"].tolist() == [1, 0.75, 1]
    assert found["low"][1] == pytest.approx(np.percentile([2, 0.5, -3, 2], 2.5))
    assert found["resamples"].tolist() == [4] * 3
    signed = edge_stability([table], {"top": 1}, "signed")
    assert signed["selected"].tolist() == [0, 0.25, 0.75]


def test_edges_into_the_metric_are_no_candidates(tmp_path):
    last = candidate_edges(*write_edges(tmp_path, METRIC, [("resid.1", 3, -3, -3.0)], [[0], [-3]]), [R3, S3])
    assert last[0]["up"].tolist() == []
    assert last[1].shape == (2, 0)


def test_draws_of_another_table_are_refused(tmp_path):
    edges, draws = write_edges(tmp_path, "resid.1", [("resid.0", 3, 3, 1.0)], [[1, 2]])
    with pytest.raises(UserError, match="do not fit the edges"):
        candidate_edges(edges, draws, [R3, S3])


def test_the_stage_writes_both_tables(pairs, tmp_path):
    tables = [
        write_edges(tmp_path, "resid.1", [("resid.0", 3, 3, 2.0), ("resid.0", 5, 3, 1.0)], [[2, 1], [1, 2]]),
        write_edges(tmp_path, METRIC, [("resid.1", 3, -3, -3.0)], [[-3], [-3]]),
    ]
    edges = (Edge(R3.id, S3.id, 2.0), Edge(S3.id, METRIC, -3.0))
    write_circuit(tmp_path / "circuit.json", Circuit(tuple(SITES), (R3, R5, S3), edges))
    inputs = {
        "circuit": tmp_path / "circuit.json",
        "pairs": pairs,
        "edges": [edges for edges, _ in tables],
        "draws": [draws for _, draws in tables],
    }
    params = {"sites": SITES, "nodes": {"faithfulness": 0.8}, "edges": {"top": 1}}
    params |= {"ranking": "absolute", "pool": 5, "resamples": 40, "seed": 3}
    files = {name: tmp_path / f"stability.{name}.parquet" for name in ("nodes", "edges")}
    circuit_stability(inputs, params, Output(tmp_path, files, {"stage": "circuit_stability"}))
    nodes, found = (read_table(files[name]) for name in ("nodes", "edges"))
    row = by_node(nodes)
    assert nodes["in_circuit"][row["resid.0/5"]]  # stays, though no draw of three nodes may choose it
    assert not nodes["in_circuit"][row["resid.0/-1"]]
    assert nodes["passes"].sum() == 3
    assert set(nodes["pairs"]) == {4}
    assert not math.isnan(nodes["low"].sum())
    assert found["in_circuit"].tolist() == [True, False]  # edges into the metric are subject to no rule
    assert found["selected"].tolist() == [0.5, 0.5]

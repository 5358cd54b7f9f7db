"""Comparing circuits: overlaps and agreement by hand, sites and dictionaries that differ, matched features."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node, write_circuit
from circuitflow.circuits.comparison import agreement, compare, compare_two, matched_features, overlap
from circuitflow.cli import app
from circuitflow.errors import UserError

MADE = {"model": "toy", "task": "t", "dictionaries": {"resid.0": "x", "resid.1": "y", "resid.2": "z"}}


def node(site, feature, score, position=None) -> Node:
    return Node(site, "error" if feature < 0 else "feature", feature, score, position)


A = Circuit(
    ("resid.0", "resid.1"),
    (node("resid.0", 1, 2.0), node("resid.0", -1, 1.0), node("resid.1", 4, -1.0)),
    (
        Edge("resid.0/1", "resid.1/4", 0.5),
        Edge("resid.0/error", "resid.1/4", 0.25),
        Edge("resid.1/4", METRIC, -1.0),
    ),
    provenance=MADE,
)
B = Circuit(
    ("resid.0", "resid.1", "resid.2"),
    (
        node("resid.0", 1, 1.0),
        node("resid.1", 4, 3.0),
        node("resid.1", 5, 1.0),
        node("resid.2", 1, 9.0),
    ),
    (Edge("resid.0/1", "resid.1/4", 0.5), Edge("resid.1/4", "resid.2/1", 0.5)),
    provenance=MADE,
)


def test_two_circuits_by_hand():
    found = compare_two(A, B)
    assert found["sites"] == found["compared"] == ["resid.0", "resid.1"]
    assert found["left_out"] == {"a": [], "b": ["resid.2"]}
    assert found["nodes"] == {"a": 3, "b": 3, "both": 2, "jaccard": 0.5, "share_a": 2 / 3, "share_b": 2 / 3}
    assert found["edges"] == {"a": 3, "b": 1, "both": 1, "jaccard": 1 / 3, "share_a": 1 / 3, "share_b": 1}
    a, b = np.array([2.0, 1, -1, 0]), np.array([1.0, 0, 3, 1])
    assert found["scores"]["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    # ranks 4 3 1 2 and 2.5 1 4 2.5
    expected = np.corrcoef([4, 3, 1, 2], [2.5, 1, 4, 2.5])[0, 1]
    assert found["scores"]["spearman"] == pytest.approx(expected)
    assert found["scores"]["sign_agreement"] == 0.5
    assert found["scores"]["weighted_jaccard"] == pytest.approx((1 + 0 + 1 + 0) / (2 + 1 + 3 + 1))
    assert found["scores"]["union"] == 4
    first, second = found["per_site"]
    assert first["effect_share_a"] == 0.75
    assert first["effect_share_b"] == 0.2
    assert first["error_share_a"] == pytest.approx(1 / 3)
    assert first["error_share_b"] == second["error_share_a"] == 0
    assert second["nodes"]["jaccard"] == 0.5
    assert second["scores"]["sign_agreement"] == 0


def test_a_circuit_agrees_with_itself():
    found = compare_two(A, A)
    assert found["nodes"]["jaccard"] == found["edges"]["jaccard"] == 1
    scores = found["scores"]
    assert scores["pearson"] == pytest.approx(1)
    assert scores["spearman"] == pytest.approx(1)
    assert scores["sign_agreement"] == scores["weighted_jaccard"] == 1
    assert found["notes"] == []


def test_nothing_in_common_says_nothing_of_signs():
    assert overlap({}, {})["jaccard"] is None
    assert agreement({}, {})["pearson"] is None
    apart = agreement({1: 1.0}, {2: 1.0})
    assert apart["sign_agreement"] is None
    assert apart["weighted_jaccard"] == 0
    assert agreement({1: 0.1, 2: 0.1, 3: 0.1}, {1: 1.0, 2: 2.0, 3: 3.0})["pearson"] is None


def test_where_dictionaries_differ_only_shares_are_compared():
    other = replace(A, provenance={**MADE, "dictionaries": {**MADE["dictionaries"], "resid.0": "new"}})
    found = compare_two(A, other)
    assert found["compared"] == ["resid.1"]
    assert "dictionaries differ at resid.0" in found["notes"][0]
    assert found["nodes"]["a"] == found["nodes"]["both"] == 1
    assert found["edges"]["a"] == 1  # from resid.1 to the metric
    row = found["per_site"][0]
    assert row["effect_share_a"] == row["effect_share_b"] == 0.75
    assert "nodes" not in row


def test_models_that_differ_share_no_features():
    found = compare_two(A, replace(A, provenance={**MADE, "model": "other"}))
    assert found["compared"] == []
    assert found["nodes"] is found["edges"] is found["scores"] is None
    assert "models differ (toy, other)" in found["notes"][0]


def test_unknown_dictionaries_are_noted():
    found = compare_two(A, replace(A, provenance={}))
    assert "does not record its dictionaries" in found["notes"][0]
    assert found["nodes"]["jaccard"] == 1


def test_matched_features_are_each_others_nearest():
    a = np.array([[1.0, 0, 0], [0, 2, 0], [0.9, 0.1, 0], [0, 0, 0]])
    b = np.array([[0, 5.0, 0.1], [3, 0, 0], [0, 0, -1], [0, 0, 0]])
    found = matched_features(a, b)
    assert found.a.tolist() == [0, 1]
    assert found.b.tolist() == [1, 0]
    assert found.cosine == pytest.approx([1, 5 / np.hypot(5, 0.1)], abs=1e-6)
    assert matched_features(a, b, least_cosine=0.9999).a.tolist() == [0]
    with pytest.raises(UserError, match="width 3 and 2"):
        matched_features(a, b[:, :2])


def test_a_shuffled_dictionary_is_found_again(monkeypatch):
    monkeypatch.setattr("circuitflow.circuits.comparison.ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(0)
    rows, order = rng.normal(size=(40, 16)), rng.permutation(40)
    found = matched_features(rows, 3 * rows[order])
    assert order[found.b].tolist() == found.a.tolist() == list(range(40))
    unlike = matched_features(rows, rng.normal(size=(40, 16)), 0.99)
    assert len(unlike.a) == 0


def test_matched_features_are_compared_across_dictionaries():
    digests = {**MADE["dictionaries"], "resid.0": "new", "resid.1": "new"}
    nodes = (node("resid.0", 8, 2.0), node("resid.0", -1, 1.0), node("resid.1", 4, -1.0))
    edges = (Edge("resid.0/8", "resid.1/4", 0.5),)
    other = Circuit(A.sites, nodes, edges, provenance={**MADE, "dictionaries": digests})
    rows = np.eye(9)
    swapped = rows[[8, *range(1, 8), 0]]
    swapped[[1, 8]] = swapped[[8, 1]]  # feature 1 of a is 8 of b
    matched = matched_features(rows, swapped)
    found = compare({"a": A, "b": other}, {("a", "b"): {"resid.0": matched, "resid.1": matched}})["pairs"][0]
    assert dict(zip(matched.a, matched.b, strict=True))[1] == 8
    assert found["nodes"]["jaccard"] == 1
    assert found["edges"]["both"] == 1
    assert found["matched"] == {"resid.0": 9, "resid.1": 9}
    assert "matched by decoder direction" in found["notes"][0]
    none = matched_features(rows, -rows)
    unmatched = compare({"a": A, "b": other}, {("a", "b"): {"resid.0": none, "resid.1": none}})["pairs"][0]
    assert unmatched["nodes"]["both"] == 1  # the error


def test_positions_are_summed_where_only_one_circuit_has_them():
    nodes = (
        node("resid.0", 1, 1.5, 0),
        node("resid.0", 1, 0.5, 3),
        node("resid.0", -1, 1.0, 3),
        node("resid.1", 4, -1.0, 3),
    )
    edges = (Edge("resid.0/1@0", "resid.1/4@3", 0.25), Edge("resid.0/1@3", "resid.1/4@3", 0.25))
    placed = Circuit(A.sites, nodes, edges, provenance=MADE)
    found = compare_two(A, placed)
    assert found["nodes"]["jaccard"] == found["scores"]["weighted_jaccard"] == 1
    assert found["edges"]["both"] == found["edges"]["b"] == 1
    assert "summed over positions" in found["notes"][0]
    assert compare_two(placed, placed)["nodes"]["a"] == 4


def test_one_circuit_is_not_compared():
    with pytest.raises(UserError, match="two circuits or more"):
        compare({"a": A})


def test_the_command_prints_tables_or_json(tmp_path):
    paths = [str(tmp_path / f"{name}.json") for name in ("a", "b", "c")]
    for path, circuit in zip(paths, (A, B, A), strict=True):
        write_circuit(tmp_path / path, circuit)
    shown = CliRunner().invoke(app, ["compare", *paths])
    assert shown.exit_code == 0
    assert [line.strip() for line in shown.output.splitlines()].count("A and C") == 1
    assert "only in B: resid.2" in shown.output
    (nodes,) = {
        line for line in shown.output.split("A and C")[1].split("B and C")[0].splitlines() if "nodes" in line
    }
    assert nodes.split() == ["nodes", "3", "3", "3", "1.00", "100%", "100%", "1.00", "1.00", "100%", "1.00"]
    said = json.loads(CliRunner().invoke(app, ["compare", "--json", *paths[:2]]).output)
    assert said["pairs"][0]["nodes"]["jaccard"] == 0.5
    assert said["circuits"][0]["task"] == "t"
    twice = CliRunner().invoke(app, ["compare", paths[0], paths[0]])
    assert isinstance(twice.exception, UserError)

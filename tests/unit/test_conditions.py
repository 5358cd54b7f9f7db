"""Which circuits are evaluated: ranked nodes, growing, assembled and random circuits, and the conditions they meet."""

import numpy as np
import pytest

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits.circuit import Circuit, Node
from circuitflow.circuits.composition import made_of
from circuitflow.circuits.conditions import (
    Candidate,
    Condition,
    competing,
    conditions,
    empty,
    grown,
    randomly,
    whole,
)
from circuitflow.circuits.interventions import everything, keep, key, nothing
from circuitflow.circuits.sweep import _drawn, random_nodes, ranked_nodes

SITES = ("embed", "resid.0", "resid.1")
NODES = {
    "site": np.array(["embed"] * 4 + ["resid.0"] * 3 + ["resid.1"] * 3, object),
    "feature": np.array([3, 1, -1, 9, 5, -1, 7, 2, 4, -1]),
    "position": np.full(10, SUMMED),
    "score_train": np.array([-4.0, 2.0, 1.0, 0.5, 3.0, 2.0, 0.25, 1.5, 0.125, 0.0]),
}
MAIN = Condition("mean", "embed", "scored", main=True)
PARAMS = {"counts": [2, 4, 50], "thresholds": [], "shares": []}


def test_nodes_are_ranked_over_all_sites_without_those_that_do_nothing():
    ranked = ranked_nodes(NODES, SITES)
    first = [("embed", 3), ("resid.0", 5), ("embed", 1), ("resid.0", -1), ("resid.1", 2)]
    assert ranked.nodes[:5] == [(*node, SUMMED) for node in first]
    assert ("resid.1", -1, SUMMED) not in ranked.nodes
    assert ranked.strengths.tolist() == sorted(ranked.strengths, reverse=True)


def test_nodes_may_be_ranked_with_their_sign():
    ranked = ranked_nodes(NODES, SITES, "signed")
    assert ranked.nodes[0] == ("resid.0", 5, SUMMED)
    assert ranked.nodes[-1] == ("embed", 3, SUMMED)
    assert ranked.above(0.5) == ranked.top(4)
    assert [one.threshold for one in grown(ranked, MAIN, {"counts": []})] == [-4.0, -4.0]


def test_a_pool_is_the_strongest_features_of_each_site_and_the_errors():
    pooled = ranked_nodes(NODES, SITES).pooled(1)
    kept = [("embed", 3), ("resid.0", 5), ("resid.0", -1), ("resid.1", 2), ("embed", -1)]
    assert pooled.nodes == [(*node, SUMMED) for node in kept]
    assert pooled.strengths.tolist() == [4, 3, 2, 1.5, 1]


def test_nodes_of_positions_are_ranked_and_drawn_at_their_position():
    table = {
        "site": np.array(["embed"] * 7, object),
        "feature": np.array([3, 3, 1, 1, 8, -1, -1]),
        "position": np.array([4, 2, 2, 4, 2, 2, 4]),
        "score_train": np.array([4.0, 4.0, 3.0, 0.5, 0.25, 2.0, 1.0]),
    }
    ranked = ranked_nodes(table, SITES)
    assert ranked.nodes[:4] == [("embed", 3, 2), ("embed", 3, 4), ("embed", 1, 2), ("embed", -1, 2)]
    drawn = [_drawn(ranked, 4, np.random.default_rng(seed)) for seed in range(60)]
    for nodes in drawn:
        assert sorted(position for _, feature, position in nodes if feature != ERROR) == [2, 2, 4]
        assert [node for node in nodes if node[1] == ERROR] == [("embed", ERROR, 2)]
        assert {feature for _, feature, position in nodes if position == 4} <= {3, 1}
    assert len(set(map(tuple, drawn))) == 6  # 3 pairs at position 2, 2 features at position 4


def test_sizes_are_listed_once_with_what_asked_for_them_first():
    ranked = ranked_nodes(NODES, SITES)  # strengths 4 3 2 2 1.5 1 .5 .25 .125
    assert ranked.sizes([2, 4, 50], [0.5, 0.03], [0.001, 0.5]) == [
        (1, "share"),
        (2, "count"),
        (4, "count"),
        (9, "count"),
    ]
    assert ranked.sizes([], [0.3, 0.1], [0.33]) == [
        (3, "share"),
        (5, "threshold"),
        (7, "threshold"),
        (9, "all"),
    ]


def test_growing_circuits_come_with_their_complements():
    found = grown(ranked_nodes(NODES, SITES), MAIN, PARAMS)
    assert [(one.series, len(one.nodes), one.threshold) for one in found] == [
        ("circuit", 2, 3.0),
        ("complement", 2, 3.0),
        ("circuit", 4, 2.0),
        ("complement", 4, 2.0),
        ("circuit", 9, 0.125),
        ("complement", 9, 0.125),
    ]
    assert [one.share for one in found[::2]] == pytest.approx([2 / 9, 4 / 9, 1])
    circuit, rest = (one.intervention(SITES, "embed") for one in found[:2])
    assert key(circuit) == key(keep([("embed", 3, SUMMED), ("resid.0", 5, SUMMED)], SITES))
    assert [state.kept.complement for state in rest.values()] == [True] * 3


def test_random_circuits_match_sites_and_kinds():
    ranked = ranked_nodes(NODES, SITES)
    found = random_nodes(ranked, [5, 99], draws=20, seed=0)
    assert [(n, draw) for n, draw, _ in found] == [(n, draw) for n in (5, 9) for draw in range(20)]
    for _, _, nodes in found[:20]:
        sites = [site for site, _, _ in nodes]
        assert [sites.count(site) for site in SITES] == [2, 2, 1]
        assert [node for node in nodes if node[1] == ERROR] == [("resid.0", ERROR, SUMMED)]
        assert {feature for site, feature, _ in nodes if site == "embed"} <= {3, 1, 9}
    assert len({tuple(nodes[:2]) for _, _, nodes in found[:20]}) == 3
    assert random_nodes(ranked, [5], draws=20, seed=0) == found[:20]
    params = {"random_counts": [5], "random_draws": 2, "seed": 0}
    assert [(one.series, one.draw) for one in randomly(ranked, MAIN, params)] == [
        ("random", 0),
        ("random", 1),
    ]
    assert randomly(ranked, Condition("zero", "embed", "scored"), params) == []


ASSEMBLED = Circuit(SITES, (Node("embed", "feature", 3, -4.0), Node("resid.0", "error", -1, 2.0)), ())


def test_the_assembled_circuit_is_evaluated_as_it_is():
    circuit, rest = whole(ASSEMBLED, MAIN, "absolute")
    assert (circuit.threshold, circuit.source) == (2.0, "assembled")
    assert circuit.nodes == (("embed", 3, SUMMED), ("resid.0", ERROR, SUMMED))
    assert (rest.series, rest.nodes) == ("complement", circuit.nodes)
    assert rest.intervention(SITES, "embed")["resid.1"].kept.everything
    assert whole(ASSEMBLED, Condition("mean", "embed", "kept"), "absolute") == []


def test_a_start_frees_the_sites_before_it_and_leaves_their_nodes_out():
    late = Condition("mean", "resid.0", "scored")
    found = grown(ranked_nodes(NODES, SITES), late, {"counts": [1]})
    assert found[0].nodes == (("resid.0", 5, SUMMED),)
    assert len(found[2].nodes) == 5
    for one in found[:2]:
        states = one.intervention(SITES, late.start)
        assert states["embed"].untouched
        assert not states["resid.0"].untouched
    assert empty(late, SITES)["embed"].untouched
    assert empty(late, SITES)["resid.1"].blind
    assert key(empty(MAIN, SITES)) == key(nothing(SITES)) != key(everything(SITES))
    circuit, _ = whole(ASSEMBLED, late, "absolute")
    assert circuit.nodes == (("resid.0", ERROR, SUMMED),)


def test_errors_are_kept_or_removed():
    ranked = ranked_nodes(NODES, SITES)
    kept, removed = (Condition("mean", "embed", errors) for errors in ("kept", "removed"))
    first = grown(ranked, kept, {"counts": [1]})
    assert first[0].nodes == (("embed", 3, SUMMED), ("resid.0", ERROR, SUMMED), ("embed", ERROR, SUMMED))
    assert {one.series for one in first} == {"circuit"}
    assert first[0].share == pytest.approx(1 / 7)
    assert [len(one.nodes) for one in grown(ranked, removed, {"counts": [1]})] == [1, 7]
    assert not [node for node in competing(ranked, removed).nodes if node[1] == ERROR]


def test_errors_of_the_residual_stream_are_told_from_others():
    table = {**NODES, "site": np.array(["mlp.0"] * 4 + ["resid.0"] * 6, object)}
    ranked = ranked_nodes(table, ("mlp.0", "resid.0"))
    left = {
        errors: [
            node[0]
            for node in competing(ranked, Condition("mean", "mlp.0", errors)).nodes
            if node[1] == ERROR
        ]
        for errors in ("resid_removed", "other_removed", "removed", "scored")
    }
    assert left == {
        "resid_removed": ["mlp.0"],
        "other_removed": ["resid.0"],
        "removed": [],
        "scored": ["resid.0", "mlp.0"],
    }


def test_each_condition_changes_one_thing_and_is_listed_once():
    params = {
        "sites": SITES,
        "ablation": "mean",
        "further_ablations": ["zero", "mean"],
        "starts": ["resid.0", "embed"],
        "errors": ["kept", "removed", "resid_removed", "scored"],
        "neurons": True,
    }
    found = conditions(params)
    assert found[0] == MAIN
    assert [(one.ablation, one.start, one.errors, one.base) for one in found[1:]] == [
        ("zero", "embed", "scored", "features"),
        ("mean", "resid.0", "scored", "features"),
        ("mean", "embed", "kept", "features"),
        ("mean", "embed", "removed", "features"),
        ("mean", "embed", "none", "neurons"),
    ]
    with_mlp = conditions({**params, "sites": ["mlp.0", "resid.0"], "starts": []})
    assert "resid_removed" in [one.errors for one in with_mlp]


def test_neurons_have_a_series_of_their_own():
    found = grown(ranked_nodes(NODES, SITES), Condition("mean", "embed", "none", "neurons"), {"counts": [2]})
    assert [one.series for one in found] == ["neurons", "neurons"]


def test_a_circuits_make_up_is_counted():
    nodes = [
        ("embed", 3, SUMMED),
        ("resid.0", 5, SUMMED),
        ("resid.0", ERROR, SUMMED),
        ("mlp.1", ERROR, SUMMED),
    ]
    rows = made_of("count", nodes, np.array([4.0, -3.0, 2.0, 1.0]), ("embed", "resid.0", "mlp.1"))
    told = {(row[2], row[3]): (row[4], row[5], row[7]) for row in rows if row[4]}
    assert told == {
        ("embed", "feature"): (1, 0.25, 0.4),
        ("resid.0", "feature"): (1, 0.25, 0.3),
        ("resid.0", "residual_error"): (1, 0.25, 0.2),
        ("mlp.1", "other_error"): (1, 0.25, 0.1),
    }
    assert len(rows) == 6
    assert {row[1] for row in rows} == {4}


def test_candidates_of_equal_nodes_are_one_experiment():
    nodes = (("embed", 3, SUMMED), ("resid.0", 5, SUMMED))
    one = Candidate("circuit", "count", nodes, 3.0, 0.1)
    other = Candidate("circuit", "assembled", nodes[::-1], 3.0, float("nan"))
    assert key(one.intervention(SITES, "embed")) == key(other.intervention(SITES, "embed"))

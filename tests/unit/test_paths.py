"""Which sites are neighbours: the edge table of sparse feature circuits, derived from lists of sites."""

import pytest

from circuitflow.attribution.paths import Blocks, Way, begin, neighbours, possible_neighbours, way_into

EVERY = ["resid.0", "attn.1", "mlp.1", "resid.1", "attn.2", "mlp.2", "resid.2"]


def test_with_every_site_the_rules_are_those_of_sparse_feature_circuits():
    assert neighbours(EVERY, Blocks(3)) == {
        "resid.0": [],
        "attn.1": ["resid.0"],
        "mlp.1": ["resid.0", "attn.1"],
        "resid.1": ["resid.0", "attn.1", "mlp.1"],
        "attn.2": ["resid.1"],
        "mlp.2": ["resid.1", "attn.2"],
        "resid.2": ["resid.1", "attn.2", "mlp.2"],
        "metric": ["resid.2"],
    }


def test_parallel_blocks_have_no_edge_from_attention_to_mlp():
    sequential, parallel = neighbours(EVERY, Blocks(3)), neighbours(EVERY, Blocks(3, parallel=True))
    assert parallel["mlp.1"] == ["resid.0"]
    assert parallel["resid.1"] == sequential["resid.1"]


def test_residual_sites_alone_are_joined_one_after_the_other():
    found = neighbours(["resid.6", "resid.12", "resid.18"], Blocks(30))
    assert found == {"resid.6": [], "resid.12": ["resid.6"], "resid.18": ["resid.12"], "metric": ["resid.18"]}


def test_sublayers_alone_are_all_joined_and_all_reach_the_metric():
    found = neighbours(["mlp.2", "mlp.0", "mlp.1"], Blocks(4))
    assert found["mlp.2"] == ["mlp.0", "mlp.1"]
    assert found["metric"] == ["mlp.0", "mlp.1", "mlp.2"]


def test_z_stands_before_attn():
    found = neighbours(["embed", "z.0", "attn.0", "resid_mid.0", "mlp.0", "resid.0"], Blocks(1))
    assert found["z.0"] == ["embed"]
    assert found["attn.0"] == ["z.0"]
    assert found["resid_mid.0"] == ["embed", "attn.0"]
    assert found["mlp.0"] == ["resid_mid.0"]
    assert found["resid.0"] == ["resid_mid.0", "mlp.0"]


@pytest.mark.parametrize("sites", [EVERY, ["mlp.0", "mlp.2"], ["z.1", "attn.1", "resid.2"]])
def test_unknown_models_have_all_neighbours_of_either_build(sites):
    possible = possible_neighbours(sites)
    for blocks in (Blocks(3), Blocks(5), Blocks(5, parallel=True)):
        for down, ups in neighbours(sites, blocks).items():
            assert set(ups) <= set(possible[down])


def test_ways_are_named_by_what_they_pass():
    for parallel in (False, True):
        assert way_into("resid.1", EVERY, Blocks(3, parallel)) is Way.ADDED
        assert way_into("mlp.1", EVERY, Blocks(3, parallel)) is Way.BY_TOKEN
        assert way_into("attn.1", EVERY, Blocks(3, parallel)) is Way.MIXING
        assert way_into("metric", EVERY, Blocks(3, parallel)) is Way.MIXING
    assert way_into("resid.1", ["resid.0", "attn.1", "resid.1"], Blocks(3)) is Way.BY_TOKEN
    assert way_into("attn.1", ["z.1", "attn.1"], Blocks(3)) is Way.BY_TOKEN
    assert way_into("resid_mid.1", ["resid.0", "attn.1", "resid_mid.1"], Blocks(3)) is Way.ADDED
    assert way_into("mlp.1", ["resid.0", "mlp.1"], Blocks(3)) is Way.MIXING
    assert way_into("mlp.1", ["resid.0", "mlp.1"], Blocks(3, parallel=True)) is Way.BY_TOKEN


def test_passes_begin_at_the_deepest_full_cut():
    assert begin("mlp.2", EVERY) == "resid.1"
    assert begin("metric", EVERY) == "resid.2"
    assert begin("mlp.2", ["attn.1", "mlp.2"]) is None

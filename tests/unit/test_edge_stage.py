"""The stage score_edges: its tables, their pools and draws, and going on after an interruption."""

import numpy as np
import pytest
import torch

from circuitflow.attribution import edges
from circuitflow.attribution.edges import PARTIAL, score_edges
from circuitflow.attribution.ends import End
from circuitflow.attribution.nodes import ERROR, METRIC, REST, SUMMED
from circuitflow.attribution.paths import Blocks, neighbours
from circuitflow.attribution.pullback import Into, edge_effects
from circuitflow.attribution.scores import score_pairs
from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.jobs import Output
from circuitflow.store.tables import read_table, write_table
from tests.fixtures.attribution_toy import (
    cached_sites,
    cut,
    toy_dictionary,
    toy_pairs,
    write_gradients,
)

SPLITS = ("train", "test")
SITES = ["resid.0", "attn.1", "mlp.1", "resid.1"]


@pytest.fixture
def stage(random_lm, tmp_path, monkeypatch):
    """Runs score_edges on files, with a float32 model that is already loaded."""
    lm, pairs = random_lm("llama", "float32"), toy_pairs(7)
    monkeypatch.setattr(edges, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(edges, "load_token_pairs", lambda _: pairs)
    exact = cached_sites(random_lm("llama"), pairs, SITES)
    gradients = write_gradients(tmp_path, "train", exact)
    files = {}
    for seed, site in enumerate(SITES):
        dictionary = toy_dictionary(site, lm.width(site), seed=seed)
        save_dictionary(tmp_path / f"{site}.safetensors", dictionary.to(torch.float32))
        nodes = score_pairs(dictionary, site, cut(pairs, exact, 7), pairs).nodes
        both = {name: np.concatenate([column, column]) for name, column in nodes.items()}
        both["split"] = np.repeat(np.array(SPLITS, object), len(nodes["score"]))
        write_table(tmp_path / f"{site}.parquet", both)
        files[site] = (tmp_path / f"{site}.safetensors", tmp_path / f"{site}.parquet")

    def compute(down="mlp.1", folder="edges", **changed):
        place = tmp_path / "objects" / folder / down
        place.mkdir(parents=True, exist_ok=True)
        ups = neighbours(SITES, Blocks(2))[down]
        inputs = {
            "model": tmp_path,
            "tokens": tmp_path,
            "gradients": gradients,
            "dictionaries_up": [files[up][0] for up in ups],
            "scores_up": [files[up][1] for up in ups],
        }
        if down != "metric":
            inputs |= {"dictionary_down": files[down][0], "scores_down": files[down][1]}
        params = {
            "down": down,
            "ups": ups,
            "sites": SITES,
            "pool": 5,
            "positions": "sum",
            "ranking": "absolute",
            "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
            "batch_pairs": 3,
            "memory_mb": 100,
            "exact": 0,
            "draws": 4,
            "seed": 0,
            "dtype": "float32",
            "compute": {"device": "cpu"},
        }
        named = {"edges": place / "edges.parquet", "draws": place / "draws.parquet"}
        out = Output(place, named, {"stage": "score_edges"})
        score_edges(inputs, {**params, **changed}, out)
        return out.files

    compute.exact, compute.pairs, compute.lm, compute.files = exact, pairs, random_lm("llama"), files
    return compute


def test_the_stage_writes_every_edge_of_the_pools(stage):
    table = read_table(stage()["edges"])
    assert len(table["weight"]) == 2 * 6 * 7
    assert set(zip(table["up_site"], table["up_kind"], strict=True)) == {
        (site, kind) for site in ("resid.0", "attn.1") for kind in ("feature", "error")
    }
    assert sorted(set(table["down_kind"])) == ["error", "feature", "rest"]
    assert (table["down_feature"][table["down_kind"] == "rest"] == REST).all()
    assert set(table["up_position"]) == {SUMMED}
    assert set(table["n"]) == {7}
    assert np.isnan(table["exact"]).all()


def test_the_tables_of_all_sites_conserve_what_the_nodes_are_worth(stage):
    """Each upstream node's weights, over all tables, sum to its effect, and that is its score."""
    total, effect = {}, {}
    for down in ("attn.1", "mlp.1", "resid.1", "metric"):
        table = read_table(stage(down)["edges"])
        for row in range(len(table["weight"])):
            node = (table["up_site"][row], int(table["up_feature"][row]))
            total[node] = total.get(node, 0.0) + table["weight"][row]
            effect[node] = table["up_effect"][row]
    assert len(total) == 4 * 6
    for site in SITES:
        scores = read_table(stage.files[site][1])
        train = scores["split"] == "train"
        known = dict(zip(scores["feature"][train].tolist(), scores["score"][train].tolist(), strict=True))
        for (up, feature), value in total.items():
            if up == site:
                assert value == pytest.approx(known[feature], rel=1e-3, abs=1e-5)
                assert effect[up, feature] == pytest.approx(known[feature], rel=1e-3, abs=1e-5)


def test_errors_and_draws_are_those_of_the_pairs(stage):
    files = stage()
    table, draws = read_table(files["edges"]), read_table(files["draws"])
    up, down = (
        torch.from_numpy(table[f"{side}_feature"][table["up_site"] == "attn.1"].astype(np.int64))
        for side in ("up", "down")
    )
    ends = [
        End(site, toy_dictionary(site, 16, seed=number), features, torch.full_like(features, SUMMED))
        for number, site, features in ((1, "attn.1", up[::7].contiguous()), (2, "mlp.1", down[:6]))
    ]
    into = Into("mlp.1", (ends[0],), ends[1], tuple(SITES), False)
    each = edge_effects(stage.lm, stage.pairs, into, stage.exact)["attn.1"]
    here = table["up_site"] == "attn.1"
    assert np.allclose(table["weight"][here], each.mean(0).ravel(), rtol=1e-3, atol=1e-5)
    assert np.allclose(table["se"][here], each.std(0).ravel() / 7**0.5, rtol=1e-3, atol=1e-5)
    times = np.random.default_rng([0, 4]).poisson(1.0, (7, 4))
    expected = np.einsum("bud,br->rud", each.numpy(), times) / 7
    for number in range(4):
        assert np.allclose(draws[f"d{number}"][here], expected[number].ravel(), rtol=1e-3, atol=1e-5)


def test_the_pool_is_the_strongest_of_the_training_scores(stage):
    table = read_table(stage()["edges"])
    scores = read_table(stage.files["attn.1"][1])
    here = (scores["split"] == "train") & (scores["kind"] == "feature")
    order = np.argsort(-np.abs(scores["score"][here]))[:5]
    found = table["up_feature"][(table["up_site"] == "attn.1") & (table["up_kind"] == "feature")]
    assert set(found) == set(scores["feature"][here][order])
    signed = read_table(stage(folder="signed", ranking="signed")["edges"])
    order = np.argsort(-scores["score"][here])[:5]
    found = signed["up_feature"][(signed["up_site"] == "attn.1") & (signed["up_kind"] == "feature")]
    assert set(found) == set(scores["feature"][here][order])


def test_exact_weights_stand_beside_those_of_the_strongest_nodes(stage):
    table = read_table(stage(exact=2)["edges"])
    measured = ~np.isnan(table["exact"])
    assert measured.sum() == 2 * 2 * 7
    assert set(table["up_feature"][measured]) >= {ERROR}
    assert np.corrcoef(table["exact"][measured], table["weight"][measured])[0, 1] > 0.3


def test_edges_into_the_metric_have_one_end(stage):
    table = read_table(stage("metric")["edges"])
    assert set(table["up_site"]) == {"resid.1"}
    assert set(table["down_kind"]) == {"metric"}
    assert set(table["down_feature"]) == {METRIC}


def test_a_site_that_nothing_reaches_has_an_empty_table(stage):
    files = stage("resid.0")
    assert len(read_table(files["edges"])["weight"]) == 0
    assert len(read_table(files["draws"])["d3"]) == 0


def test_an_interrupted_stage_goes_on_and_gives_the_same_bytes(stage, monkeypatch, tmp_path):
    calls = []

    def failing(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return edge_effects(*args)

    monkeypatch.setattr(edges, "edge_effects", failing)
    with pytest.raises(KeyboardInterrupt):
        stage(folder="killed")
    assert (tmp_path / "objects" / "killed" / "mlp.1" / PARTIAL).is_file()
    calls = [None]
    resumed = {name: path.read_bytes() for name, path in stage(folder="killed").items()}
    assert len(calls) == 2
    monkeypatch.setattr(edges, "edge_effects", edge_effects)
    assert resumed == {name: path.read_bytes() for name, path in stage(folder="whole").items()}
    left = [file.name for file in (tmp_path / "objects" / "killed" / "mlp.1").iterdir()]
    assert sorted(left) == ["draws.parquet", "edges.parquet"]

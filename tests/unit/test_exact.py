"""Exact patching: true differences of the metric, however the work is cut."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitflow.attribution import exact
from circuitflow.attribution.changes import Effects, changes_of
from circuitflow.attribution.exact import Plan, interventions, measured, patch_nodes
from circuitflow.attribution.scores import score_pairs
from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.jobs import Output
from circuitflow.store.journal import Journal
from circuitflow.store.tables import read_provenance, read_table, write_table
from tests.fixtures.attribution_toy import (
    METRIC,
    cut,
    metric_with,
    toy_dictionary,
    toy_pairs,
    write_gradients,
)
from tests.fixtures.every_site import (
    CASES,
    KL,
    base_of,
    cached_of,
    change_of,
    dictionaries_of,
    effects_table,
    lm_of,
    ours,
    sites_of,
)


def patched_alone(
    lm, pairs, site, dictionary, cached, positions="sum", metric=METRIC, batch_rows=64
) -> Effects:
    slots = pairs.mask.shape[1] if positions == "none" else 1
    chosen = torch.ones(slots, dictionary.d_dict, dtype=torch.bool)
    plan = Plan(site, dictionary, positions, chosen, batch_rows)
    changes = changes_of(dictionary, cached, pairs, positions)
    rows = interventions(changes, plan, torch.zeros_like(chosen))
    return measured(base_of(lm, pairs, {site: cached}, [site], metric), rows, plan, Journal(None))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("paired", [True, False])
def test_every_node_alone_against_a_plain_pass(random_lm, case, paired):
    lm, pairs = lm_of(random_lm, case), toy_pairs(2, paired)
    dictionaries = dictionaries_of(lm)
    cached, plain = cached_of(lm, pairs, list(dictionaries)), metric_with(lm, pairs)
    for site, dictionary in dictionaries.items():
        found = effects_table(
            patched_alone(lm, pairs, site, dictionary, cached[site], batch_rows=5), pairs, dictionary.d_dict
        )
        changes = changes_of(dictionary, cached[site], pairs)
        dense = changes.features.dense()
        strongest = found.abs().sum(0).topk(min(3, dictionary.d_dict + 1)).indices.tolist()
        for node in {*strongest, dictionary.d_dict}:
            is_error = node == dictionary.d_dict
            rows = (
                changes.error(dictionary.W_dec) if is_error else dense[:, node, None] * dictionary.W_dec[node]
            )
            change = torch.zeros_like(cached[site].clean)
            change[changes.pair, changes.position] = rows
            alone = metric_with(lm, pairs, replace={site: lambda x, change=change: x + change})
            assert torch.allclose(found[:, node], alone - plain, atol=1e-11)


@pytest.mark.parametrize("positions", ["sum", "last", "none"])
@pytest.mark.parametrize("metric", [METRIC, KL], ids=["logits", "kl"])
def test_batched_is_one_by_one(random_lm, positions, metric):
    lm, pairs = random_lm("gemma2"), toy_pairs(3)
    cached = cached_of(lm, pairs, ["attn.0"], metric)["attn.0"]
    dictionary = toy_dictionary("attn.0", 16)
    one, many = (
        patched_alone(lm, pairs, "attn.0", dictionary, cached, positions, metric, size) for size in (1, 1000)
    )
    assert torch.equal(one.node, many.node)
    assert torch.allclose(one.effect, many.effect, atol=1e-12)
    assert many.effect.abs().max() > 1e-3


def test_positions_of_the_entries(random_lm):
    lm, pairs = random_lm("llama"), toy_pairs(3)
    cached, dictionary = cached_of(lm, pairs, ["mlp.0"])["mlp.0"], toy_dictionary("mlp.0", 16)
    found = {
        name: patched_alone(lm, pairs, "mlp.0", dictionary, cached, name) for name in ("sum", "last", "none")
    }
    assert set(found["sum"].position.tolist()) == {-1}
    assert torch.equal(found["last"].position, pairs.position[found["last"].pair])
    here = found["none"].position == pairs.position[found["none"].pair]
    assert torch.equal(found["none"].node[here], found["last"].node)
    assert torch.allclose(found["none"].effect[here], found["last"].effect, atol=1e-12)


def test_where_the_metric_is_linear_in_the_site_atp_and_exact_agree(random_lm):
    """One token's logits before the last norm: a linear stand-in for the model."""
    pairs, dictionary = toy_pairs(4), toy_dictionary("resid.0", 16)
    lm = random_lm("llama")
    cached = cached_of(lm, pairs, ["resid.0"])["resid.0"]

    class Linear:
        metric, pairs = METRIC, None

        def __init__(self):
            self.pairs, self.lm = pairs, lm

        def values(self, site, rows, change, grad=False):
            return ((cached.clean[rows] + change) * cached.gradient[rows]).sum((1, 2)), change

    plan = Plan("resid.0", dictionary, "sum", torch.ones(1, 24, dtype=torch.bool), 8)
    rows = interventions(changes_of(dictionary, cached, pairs), plan, torch.zeros_like(plan.chosen))
    found = effects_table(measured(Linear(), rows, plan, Journal(None)), pairs, 24)
    assert torch.allclose(found, ours(dictionary, cached, pairs), atol=1e-10)


def test_equal_runs_give_zeros(random_lm):
    lm, pairs = random_lm("llama"), toy_pairs(3)
    cached = cached_of(lm, pairs, ["mlp.0"])["mlp.0"]
    same = replace(cached, patched=cached.clean)
    found = patched_alone(lm, pairs, "mlp.0", toy_dictionary("mlp.0", 16), same)
    assert not found.effect.any()
    assert len(found.effect) > 3


def test_for_a_dictionary_without_features_the_error_is_the_whole_site(random_lm):
    lm, pairs = random_lm("gpt_neox"), toy_pairs(3)
    site = sites_of(lm)[3]
    dictionary = dictionaries_of(lm)[site]
    assert dictionary.d_dict == 0
    cached = cached_of(lm, pairs, [site])
    found = patched_alone(lm, pairs, site, dictionary, cached[site])
    change = change_of(dictionary, cached[site], pairs)
    alone = metric_with(lm, pairs, replace={site: lambda x: x + change})
    assert torch.allclose(found.effect, alone - metric_with(lm, pairs), atol=1e-11)
    tables = score_pairs(dictionary, site, cut(pairs, cached, 2), pairs)
    assert tables.nodes["kind"].tolist() == ["error"]


@pytest.fixture
def stage(random_lm, monkeypatch, tmp_path):
    """Runs the stage at resid.0 of toy pairs."""
    lm, pairs = random_lm("llama"), toy_pairs(5)
    monkeypatch.setattr(exact, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(exact, "load_token_pairs", lambda _: pairs)
    cached = cached_of(lm, pairs, ["resid.0"])
    gradients = write_gradients(tmp_path, "base", cached)
    save_dictionary(tmp_path / "d.safetensors", toy_dictionary("resid.0", 16))
    atp = score_pairs(toy_dictionary("resid.0", 16), "resid.0", cut(pairs, cached, 5), pairs)
    write_table(tmp_path / "atp.parquet", {"split": ["train"] * len(atp.nodes["score"]), **atp.nodes})

    def compute(folder="made", **params):
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        files = {name: root / f"{name}.parquet" for name in ("scores", "positions", "pairs")}
        inputs = {
            "model": tmp_path,
            "dictionary": tmp_path / "d.safetensors",
            "scores": tmp_path / "atp.parquet",
        }
        inputs |= {f"gradients_{split}": gradients for split in ("train", "test")}
        inputs |= {f"tokens_{split}": tmp_path for split in ("train", "test")}
        common = {
            "site": "resid.0",
            "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
            "budget": None,
            "batch_rows": 16,
            "dtype": "float64",
            "compute": {"device": "cpu"},
        }
        patch_nodes(inputs, {**common, **params}, Output(root, files, {}))
        return {name: read_table(path) for name, path in files.items()}, read_provenance(files["scores"])

    compute.lm, compute.pairs, compute.atp, compute.root, compute.cached = lm, pairs, atp, tmp_path, cached
    return compute


def test_the_stage_writes_the_tables_of_score_nodes(stage):
    tables, provenance = stage()
    train = tables["scores"]["split"] == "train"
    assert set(tables["scores"]) == {"split", *stage.atp.nodes}
    assert tables["scores"]["feature"][train].tolist() == stage.atp.nodes["feature"].tolist()
    assert np.array_equal(tables["scores"]["activity"][train], stage.atp.nodes["activity"])
    assert set(tables["pairs"]) == {"split", *stage.atp.pairs}
    assert len(tables["positions"]["score"]) == 0
    assert provenance["budget"] == {"features": None, "nodes_left_out": {"train": 0, "test": 0}}
    found = patched_alone(
        stage.lm, stage.pairs, "resid.0", toy_dictionary("resid.0", 16), stage.cached["resid.0"]
    )
    expected = effects_table(found, stage.pairs, 24).mean(0)
    feature = tables["scores"]["feature"][train]
    assert np.allclose(tables["scores"]["score"][train], expected[feature], rtol=1e-4, atol=1e-5)


def test_a_budget_takes_the_strongest_features_and_always_the_error(stage):
    tables, provenance = stage(budget=3)
    features = stage.atp.nodes["feature"][stage.atp.nodes["kind"] == "feature"]
    strongest = features[np.argsort(-np.abs(stage.atp.nodes["score"][:-1]))][:3]
    train = tables["scores"]["split"] == "train"
    assert sorted(tables["scores"]["feature"][train].tolist()) == sorted([-1, *strongest.tolist()])
    assert provenance["budget"]["nodes_left_out"] == {"train": len(features) - 3, "test": len(features) - 3}


def test_an_interrupted_stage_goes_on_after_its_last_pass(stage, monkeypatch):
    whole, _ = stage("whole")
    calls, real = [], exact.BaseRun.values

    def failing(self, *args, **options):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(0)
        return real(self, *args, **options)

    monkeypatch.setattr(exact.BaseRun, "values", failing)
    with pytest.raises(KeyboardInterrupt):
        stage("killed")
    journal = stage.root / "killed" / "patched.train.jsonl"
    assert len(journal.read_text().splitlines()) == 4
    with open(journal, "a") as file:
        file.write("[1.0, 2.")  # torn by the kill
    calls.clear()
    monkeypatch.setattr(
        exact.BaseRun,
        "values",
        lambda self, *args, **options: calls.append(0) or real(self, *args, **options),
    )
    resumed, _ = stage("killed")
    for table in whole:
        for name in whole[table]:
            assert np.array_equal(whole[table][name], resumed[table][name])
    assert not journal.exists()

"""Dictionaries in the loop, the traditional computation, give what scores from cached tensors give."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitflow.attribution import in_loop
from circuitflow.attribution.in_loop import encoded, score_in_loop, spliced_gradients, spliced_path_gradients
from circuitflow.attribution.path_gradients import path_fractions, path_gradient
from circuitflow.attribution.scores import score_pairs
from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_provenance, read_table
from tests.fixtures.attribution_toy import METRIC, cut, toy_dictionary, toy_pairs
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
)


def assert_same(first, second):
    size = second.abs().max()
    assert size > 0
    assert (first - second).abs().max() < 1e-9 * size


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("setting", ["paired", "unpaired", "kl"])
def test_atp_is_the_same_at_every_site_at_once(random_lm, case, setting):
    lm, pairs = lm_of(random_lm, case), toy_pairs(4, paired=setting != "unpaired")
    metric = KL if setting == "kl" else METRIC
    dictionaries = dictionaries_of(lm)
    cached = cached_of(lm, pairs, list(dictionaries), metric)
    found = spliced_gradients(lm, metric, pairs, dictionaries)
    for site, dictionary in dictionaries.items():
        looped = effects_table(found[site].effects(pairs), pairs, dictionary.d_dict)
        assert_same(ours(dictionary, cached[site], pairs), looped)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("path", "setting"), [("midpoint", "paired"), ("left", "unpaired"), ("left", "kl")])
def test_integrated_gradients_are_the_same(random_lm, case, path, setting):
    lm, pairs = lm_of(random_lm, case), toy_pairs(3, paired=setting != "unpaired")
    metric, fractions = (KL if setting == "kl" else METRIC), path_fractions(3, path)
    dictionaries = dictionaries_of(lm)
    cached = cached_of(lm, pairs, list(dictionaries), metric)
    found = spliced_path_gradients(lm, metric, pairs, dictionaries, fractions)
    base = base_of(lm, pairs, cached, list(dictionaries), metric)
    for site, dictionary in dictionaries.items():
        change = change_of(dictionary, cached[site], pairs, metric)
        gradient = path_gradient(base, site, change, fractions)
        looped = effects_table(found[site].effects(pairs), pairs, dictionary.d_dict)
        assert_same(ours(dictionary, replace(cached[site], gradient=gradient), pairs), looped)


def test_a_left_sum_of_one_step_is_attribution_patching(random_lm):
    lm, pairs = random_lm("llama"), toy_pairs(3)
    dictionaries = dictionaries_of(lm)
    atp = spliced_gradients(lm, METRIC, pairs, dictionaries)
    ig = spliced_path_gradients(lm, METRIC, pairs, dictionaries, path_fractions(1, "left"))
    for site in dictionaries:
        assert torch.allclose(atp[site].gradient.error, ig[site].gradient.error, atol=1e-12)


def test_dense_encoding_is_that_of_the_dictionary(random_lm):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    positions = torch.arange(5).repeat(2)
    for dictionary in dictionaries_of(random_lm("gpt2")).values():
        if dictionary.d_in != 16:
            continue
        state = encoded(dictionary, x)
        codes = dictionary.encode(x.flatten(0, 1), positions)
        assert torch.allclose(state.features.flatten(0, 1), codes.dense(), atol=1e-12)
        assert torch.allclose(state.error.flatten(0, 1), dictionary.error(x.flatten(0, 1), codes), atol=1e-12)


@pytest.fixture
def stage(random_lm, monkeypatch, tmp_path):
    """Runs the stage on toy pairs at two sites."""
    lm, pairs = random_lm("llama"), toy_pairs(5)
    monkeypatch.setattr(in_loop, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(in_loop, "load_token_pairs", lambda _: pairs)
    sites = ["resid.0", "mlp.1"]
    for site in sites:
        save_dictionary(tmp_path / f"{site}.safetensors", toy_dictionary(site, 16))

    def compute(**params):
        names = [
            f"{table}_{site.replace('.', '_')}"
            for site in sites
            for table in ("scores", "positions", "pairs")
        ]
        files = {name: tmp_path / f"{name}.parquet" for name in names}
        inputs = {
            "model": tmp_path,
            "dictionaries": [tmp_path / f"{site}.safetensors" for site in sites],
            "tokens_train": tmp_path,
            "tokens_test": tmp_path,
        }
        common = {
            "sites": sites,
            "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
            "batch_pairs": 2,
            "dtype": "float64",
            "compute": {"device": "cpu"},
        }
        score_in_loop(inputs, {**common, **params}, Output(tmp_path, files, {}))
        return files

    compute.lm, compute.pairs, compute.sites = lm, pairs, sites
    return compute


def test_the_stage_writes_the_tables_of_score_nodes(stage):
    files = stage()
    cached = cached_of(stage.lm, stage.pairs, stage.sites)
    for site in stage.sites:
        expected = score_pairs(toy_dictionary(site, 16), site, cut(stage.pairs, cached, 5), stage.pairs)
        name = site.replace(".", "_")
        for table, columns in (
            ("scores", expected.nodes),
            ("positions", expected.positions),
            ("pairs", expected.pairs),
        ):
            found = read_table(files[f"{table}_{name}"])
            train = found["split"] == "train"
            for column, values in columns.items():
                same = np.allclose if values.dtype.kind == "f" else np.array_equal
                assert same(found[column][train], values), (table, column)
    assert "spliced" in read_provenance(files["scores_mlp_1"])["method"]


def test_integrated_gradients_by_the_stage_and_an_estimate_that_does_not_exist(stage):
    scores = [
        read_table(stage(**params)["scores_resid_0"])["score"]
        for params in ({}, {"estimate": "ig", "steps": 4, "path": "midpoint"})
    ]
    assert not np.allclose(*scores)
    with pytest.raises(UserError, match="sae_in_loop has no estimate 'igg'"):
        stage(estimate="igg")

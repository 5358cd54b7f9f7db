"""Cached activations and gradients: right, at every architecture, and independent of how the pairs are cut."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from circuitflow.attribution import gradients
from circuitflow.attribution.cached import read_batch, trimmed
from circuitflow.attribution.gradients import cache_gradients, gradients_of
from circuitflow.data.metrics import Metric
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.architectures import ARCHITECTURES
from circuitflow.store.arrays import open_store
from circuitflow.store.objects import Manifest
from tests.fixtures.attribution_toy import METRIC, metric_with, toy_pairs

SITES = ["embed", "resid.0", "attn.1", "resid.1"]


@pytest.fixture(scope="module")
def lm(random_lm):
    return random_lm("llama")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_finite_differences(random_lm, architecture):
    lm, pairs = random_lm(architecture), toy_pairs(3)
    arrays = gradients_of(lm, pairs, SITES, METRIC)
    generator = torch.Generator().manual_seed(1)
    for site in SITES:
        direction = torch.randn(arrays[f"{site}/clean"].shape, generator=generator, dtype=torch.float64)
        direction *= pairs.mask[..., None]
        step = 1e-5
        ends = [
            metric_with(lm, pairs, replace={site: partial(torch.add, other=sign * step * direction)})
            for sign in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / (2 * step)
        got = (arrays[f"{site}/gradient"] * direction).sum((1, 2))
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-8)


def test_activations_and_metric_are_those_of_the_two_runs(lm):
    pairs = toy_pairs()
    arrays = gradients_of(lm, pairs, SITES, METRIC)
    turned = replace(pairs, clean=pairs.patch)
    assert torch.allclose(arrays["metric/clean"], metric_with(lm, pairs))
    assert torch.allclose(arrays["metric/patched"], metric_with(lm, turned))
    assert torch.equal(arrays["resid.1/patched"], gradients_of(lm, turned, SITES, METRIC)["resid.1/clean"])


def test_padding_holds_zeros_and_does_not_matter(lm):
    pairs = toy_pairs()
    arrays = gradients_of(lm, pairs, SITES, METRIC)
    short = trimmed(pairs[[0]])
    alone = gradients_of(lm, short, SITES, METRIC)
    assert short.mask.shape[1] == 4
    for site in SITES:
        for part in ("clean", "patched", "gradient"):
            assert not arrays[f"{site}/{part}"][0, 4:].any()
            assert torch.allclose(arrays[f"{site}/{part}"][0, :4], alone[f"{site}/{part}"][0], atol=1e-12)


def test_nothing_after_the_answer_has_a_gradient(lm):
    pairs = toy_pairs()
    early = replace(pairs, position=torch.full((len(pairs),), 2))
    gradient = gradients_of(lm, early, SITES, METRIC)["resid.0/gradient"]
    assert gradient[:, 2].abs().max() > 0
    assert not gradient[:, 3:].any()


def test_unpaired_prompts_have_a_patch_state_of_zeros(lm):
    arrays = gradients_of(lm, toy_pairs(paired=False), SITES, METRIC)
    assert not arrays["resid.0/patched"].any()
    assert not arrays["metric/patched"].any()
    assert arrays["resid.0/gradient"].any()


def test_kl_takes_its_gradients_on_the_patched_run(lm):
    kl, pairs = Metric("kl", "max"), toy_pairs()
    arrays = gradients_of(lm, pairs, SITES, kl)
    assert torch.allclose(arrays["metric/clean"], torch.zeros(len(pairs), dtype=torch.float64), atol=1e-12)
    assert (arrays["metric/patched"] > 0).all()
    assert arrays["resid.0/gradient"].abs().max() > 1e-3
    with pytest.raises(UserError, match="kl is flat on the clean run"):
        gradients_of(lm, toy_pairs(paired=False), SITES, kl)


@pytest.fixture
def stage(lm, monkeypatch, tmp_path):
    """Runs the stage on toy pairs with a model that is already loaded; gives the opened store."""
    pairs = toy_pairs(7)
    monkeypatch.setattr(gradients, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(gradients, "load_token_pairs", lambda _: pairs)

    def compute(folder: str, batch_pairs: int):
        out = Output(tmp_path / "objects" / folder, {}, {})
        params = {
            "sites": SITES,
            "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
            "batch_pairs": batch_pairs,
            "dtype": "float32",
            "compute": {"device": "cpu"},
        }
        cache_gradients({"model": tmp_path, "tokens": tmp_path}, params, out)
        manifest = tmp_path / f"{folder}.json"
        Manifest("store", folder, out.content, {}, out.details).write(manifest)
        return open_store(manifest)

    return SimpleNamespace(compute=compute, pairs=pairs)


def test_the_store_does_not_depend_on_the_batch_size(stage, lm):
    stores = [stage.compute(f"by{size}", size) for size in (2, 7)]
    whole = gradients_of(lm, stage.pairs, SITES, METRIC)
    for name, expected in whole.items():
        for store in stores:
            assert np.allclose(store.read(name), expected.numpy(), rtol=1e-5, atol=1e-6)
    assert stores[0].attrs == {"gradient_run": "clean"}


def test_a_batch_read_back_is_cut_to_its_longest_prompt(stage):
    store = stage.compute("store", 3)
    batch = read_batch(store, ["resid.0"], stage.pairs, 0, 1)
    assert batch.pairs.clean.shape == (1, 4)
    assert batch.sites["resid.0"].gradient.shape == (1, 4, 16)
    with pytest.raises(UserError, match="holds 7 pairs but the table of pairs has 5"):
        read_batch(store, ["resid.0"], stage.pairs[:5], 0, 5)


def test_an_interrupted_stage_goes_on_at_the_shard(stage, monkeypatch):
    done = []

    def failing(lm, pairs, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(pairs))
        return gradients_of(lm, pairs, *rest)

    monkeypatch.setattr(gradients, "gradients_of", failing)
    with pytest.raises(KeyboardInterrupt):
        stage.compute("killed", 2)
    monkeypatch.setattr(gradients, "gradients_of", lambda *args: done.append(0) or gradients_of(*args))
    resumed = stage.compute("killed", 2)
    assert done == [2, 2, 0, 0]
    monkeypatch.setattr(gradients, "gradients_of", gradients_of)
    assert resumed.content == stage.compute("whole", 2).content

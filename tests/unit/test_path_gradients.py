"""Mean gradients along paths and RelP's: conserved at every site, started late without a difference, resumable."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitflow.attribution import gradients, path_gradients
from circuitflow.attribution.cached import read_batch
from circuitflow.attribution.gradients import gradients_of
from circuitflow.attribution.path_gradients import (
    cache_method_gradients,
    path_fractions,
    path_gradient,
    relp_gradients,
)
from circuitflow.attribution.rerun import start_of
from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.linear import LINEAR, Rules
from circuitflow.models.running import run
from circuitflow.store.arrays import open_store
from circuitflow.store.objects import Manifest
from tests.fixtures.attribution_toy import METRIC, metric_with, toy_dictionary, toy_pairs, write_gradients
from tests.fixtures.every_site import (
    CASES,
    KL,
    base_of,
    cached_of,
    change_of,
    dictionaries_of,
    lm_of,
    ours,
    sites_of,
)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("paired", [True, False])
def test_features_and_error_sum_to_the_effect_of_patching_the_site_alone(random_lm, case, paired):
    lm, pairs = lm_of(random_lm, case), toy_pairs(2, paired)
    # Away from 0, where norms turn so sharply that a path of unpaired prompts that ends there needs very many steps.
    dictionaries = {
        site: replace(one, b_dec=one.b_dec + torch.linspace(-2, 2, one.d_model).double())
        for site, one in dictionaries_of(lm).items()
    }
    cached = cached_of(lm, pairs, list(dictionaries))
    base, plain = base_of(lm, pairs, cached, list(dictionaries)), metric_with(lm, pairs)
    fractions = path_fractions(150, "midpoint")
    for site, dictionary in dictionaries.items():
        change = change_of(dictionary, cached[site], pairs)
        gradient = path_gradient(base, site, change, fractions)
        total = ours(dictionary, replace(cached[site], gradient=gradient), pairs).sum(1)
        alone = metric_with(lm, pairs, replace={site: lambda x, change=change: x + change})
        assert torch.allclose(total, alone - plain, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("metric", [METRIC, KL], ids=["logits", "kl"])
def test_a_late_start_changes_nothing(random_lm, case, metric):
    """Against a plain pass from the tokens with the site replaced."""
    lm, pairs = lm_of(random_lm, case), toy_pairs(3)
    sites = sites_of(lm)
    cached = cached_of(lm, pairs, sites, metric)
    base = base_of(lm, pairs, {}, sites, metric)
    tokens = pairs.clean if metric is METRIC else pairs.patch
    for site in sites:
        dictionary = toy_dictionary(site, lm.width(site))
        change = change_of(dictionary, cached[site], pairs, metric)
        got = path_gradient(base, site, change, torch.tensor([0.3], dtype=torch.float64))
        value = (cached[site].base + 0.3 * change).detach()
        this = run(
            lm,
            tokens,
            pairs.mask,
            replace={site: lambda _, x=value: x},
            capture=[site],
            stop_at="resid.1",
            grad=True,
        )
        with torch.enable_grad():
            logits = lm.unembed(this.last[torch.arange(3), pairs.position])
            m = metric(logits, pairs.right, pairs.wrong, base.reference)
        (expected,) = torch.autograd.grad(m.sum(), this.sites[site])
        assert torch.allclose(got, expected * pairs.mask[..., None], rtol=1e-9, atol=1e-12)


def test_passes_start_as_late_as_they_can(random_lm):
    sequential, parallel = random_lm("llama").arch, random_lm("gpt_neox").arch
    assert start_of("resid.3", sequential).stream == "resid.3"
    assert start_of("mlp.3", sequential).stream == "resid.3"
    assert start_of("attn.3", parallel).stream == "resid.3"
    assert start_of("attn.3", sequential).stream == "resid.2"
    assert start_of("z.0", parallel).stream == "embed"
    assert not start_of("resid_mid.1", sequential).added


def test_steps_do_not_depend_on_how_many_fit_into_a_pass(random_lm, monkeypatch):
    lm, pairs = random_lm("llama"), toy_pairs(4)
    cached = cached_of(lm, pairs, ["attn.1"])
    base = base_of(lm, pairs, {}, ["attn.1"])
    change, fractions = (
        change_of(toy_dictionary("attn.1", 16), cached["attn.1"], pairs),
        path_fractions(5, "left"),
    )
    whole = path_gradient(base, "attn.1", change, fractions)
    monkeypatch.setattr(path_gradients, "PASS_TOKENS", 1)
    assert torch.allclose(path_gradient(base, "attn.1", change, fractions), whole, atol=1e-13)


def test_fractions():
    assert path_fractions(4, "midpoint").tolist() == [0.125, 0.375, 0.625, 0.875]
    assert path_fractions(4, "left").tolist() == [0, 0.25, 0.5, 0.75]
    with pytest.raises(UserError, match=r"scores\.path one of midpoint, left"):
        path_fractions(4, "right")
    with pytest.raises(UserError, match="of 0 steps"):
        path_fractions(0, "left")


class Quadratic:
    """m = x·H·x/2 + b·x over a whole site: stands in for a base run."""

    def __init__(self, pairs, width=4):
        generator = torch.Generator().manual_seed(0)
        pos = pairs.mask.shape[1]
        self.pairs, size = pairs, pos * width
        draw = torch.randn(size, size + 1, generator=generator, dtype=torch.float64)
        self.hessian, self.slope = draw[:, :size] + draw[:, :size].T, draw[:, -1]
        self.x = torch.randn(len(pairs), pos, width, generator=generator, dtype=torch.float64)
        self.x *= pairs.mask[..., None]

    def of(self, x):
        flat = x.flatten(1)
        return torch.einsum("bi,ij,bj->b", flat, self.hessian, flat) / 2 + flat @ self.slope

    def values(self, site, rows, change, grad=False):
        point = (self.x[rows] + change).requires_grad_(grad)
        return self.of(point), point


def test_a_quadratic_metric_needs_one_midpoint_step_and_atp_is_off_by_the_curvature():
    pairs = toy_pairs(3)
    toy = Quadratic(pairs)
    change = torch.randn(toy.x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change *= pairs.mask[..., None]
    expected = toy.of(toy.x + change) - toy.of(toy.x)
    curve = torch.einsum("bi,ij,bj->b", change.flatten(1), toy.hessian, change.flatten(1)) / 2
    for fractions, off in ((path_fractions(1, "midpoint"), 0), (path_fractions(1, "left"), curve)):
        total = (path_gradient(toy, "any", change, fractions) * change).sum((1, 2))
        assert torch.allclose(total, expected - off, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_relp_values_are_plain_gradients_of_plain_rules_and_others_of_its_own(random_lm, case):
    lm, pairs = lm_of(random_lm, case), toy_pairs(3)
    sites = sites_of(lm)
    plain = gradients_of(lm, pairs, sites, METRIC)
    same, other = (relp_gradients(lm, pairs, sites, METRIC, *rules) for rules in ([Rules()], []))
    for site in sites:
        assert torch.equal(same[site], plain[f"{site}/gradient"])
        assert not torch.allclose(other[site], same[site])


def test_relp_of_a_fully_frozen_model_is_conserved_from_block_to_block(random_lm):
    """Without biases (llama), gradient × value is the metric at every full cut of the frozen model."""
    lm, pairs = random_lm("llama"), toy_pairs(3)
    sites = ["embed", "resid.0", "resid_mid.0", "resid.1"]
    found, cached = relp_gradients(lm, pairs, sites, METRIC, LINEAR), cached_of(lm, pairs, sites)
    totals = [(found[site] * cached[site].clean).sum((1, 2)) for site in sites]
    for total in totals:
        assert torch.allclose(total, totals[-1], rtol=1e-9)


@pytest.fixture
def stage(random_lm, monkeypatch, tmp_path):
    """Runs the stage on toy pairs; the base store holds mlp.0 and resid.0 but not what mlp.1 starts from."""
    lm = random_lm("llama")
    sites = ["mlp.0", "resid.0", "mlp.1"]

    def compute(folder="made", paired=True, dictionaries=False, **params):
        pairs = toy_pairs(5, paired)
        monkeypatch.setattr(path_gradients, "load_model", lambda *_, **__: lm)
        monkeypatch.setattr(path_gradients, "load_token_pairs", lambda _: pairs)
        base = tmp_path / f"base{int(paired)}.json"
        if not base.exists():
            write_gradients(tmp_path, base.stem, cached_of(lm, pairs, sites))
        inputs = {"model": tmp_path, "tokens": tmp_path, "gradients": base}
        if dictionaries:
            inputs["dictionaries"] = []
            for site in sites:
                path = tmp_path / f"{site}.safetensors"
                save_dictionary(path, toy_dictionary(site, 16))
                inputs["dictionaries"].append(path)
        common = {
            "method": "ig",
            "steps": 4,
            "path": "midpoint",
            "sites": sites,
            "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
            "batch_pairs": 2,
            "dtype": "float64",
            "compute": {"device": "cpu"},
        }
        out = Output(tmp_path / "objects" / folder, {}, {})
        cache_method_gradients(inputs, {**common, **params}, out)
        Manifest("store", folder, out.content, {}, out.details).write(tmp_path / f"{folder}.json")
        return open_store(tmp_path / f"{folder}.json")

    compute.lm, compute.sites, compute.root = lm, sites, tmp_path
    return compute


@pytest.mark.parametrize("paired", [True, False])
def test_the_store_holds_the_mean_gradients(stage, paired):
    store, pairs, lm = stage(paired=paired, dictionaries=not paired), toy_pairs(5, paired), stage.lm
    assert set(store.arrays) == {f"{site}/gradient" for site in stage.sites}
    assert store.attrs == {"gradient_run": "clean", "method": "ig", "steps": 4, "path": "midpoint"}
    cached = cached_of(lm, pairs, stage.sites)
    base = base_of(lm, pairs, {}, stage.sites)
    for site in stage.sites:
        change = change_of(toy_dictionary(site, 16), cached[site], pairs)
        expected = path_gradient(base, site, change, path_fractions(4, "midpoint"))
        assert np.allclose(store.read(f"{site}/gradient"), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_unpaired_prompts_need_to_know_where_their_path_ends(stage):
    with pytest.raises(UserError, match="add the input dictionaries"):
        stage(paired=False)


def test_the_store_of_relp(stage):
    store = stage(method="relp", rules={"attention": "frozen"})
    assert store.attrs["rules"] == {
        "norms": "frozen", "activations": "frozen", "products": "half", "attention": "frozen",
    }  # fmt: skip
    expected = relp_gradients(stage.lm, toy_pairs(5), stage.sites, METRIC, LINEAR)
    for site in stage.sites:
        assert np.allclose(store.read(f"{site}/gradient"), expected[site].numpy(), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_done_is_refused(stage):
    with pytest.raises(UserError, match=r"scores\.method is atp"):
        stage(method="atp")
    with pytest.raises(UserError, match=r"task\.metric\.kind is kl"):
        stage(paired=False, metric={"kind": "kl", "wrong_answers": "max"})


def test_an_interrupted_stage_goes_on_at_the_shard(stage, monkeypatch):
    done, real = [], path_gradients._gradients

    def failing(*args):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(args[3])
        return real(*args)

    monkeypatch.setattr(path_gradients, "_gradients", failing)
    with pytest.raises(KeyboardInterrupt):
        stage("killed")
    monkeypatch.setattr(path_gradients, "_gradients", lambda *args: done.append(args[3]) or real(*args))
    resumed = stage("killed")
    assert done == [0, 2, 4]
    assert resumed.content == stage("whole").content


def test_gradients_on_the_patched_run_start_there(random_lm):
    """For kl the path leads from the patched value to the clean one, so its first gradient is the cached one."""
    lm, pairs = random_lm("llama"), toy_pairs(3)
    cached = cached_of(lm, pairs, ["mlp.0"], KL)
    assert gradients.gradient_run(KL) == "patched"
    base = base_of(lm, pairs, {}, ["mlp.0"], KL)
    change = change_of(toy_dictionary("mlp.0", 16), cached["mlp.0"], pairs, KL)
    got = path_gradient(base, "mlp.0", change, path_fractions(1, "left"))
    assert torch.allclose(got, cached["mlp.0"].gradient, rtol=1e-9, atol=1e-12)


def test_read_batch_of_the_base_store_is_unchanged(stage):
    stage()
    batch = read_batch(open_store(stage.root / "base1.json"), ["mlp.1"], toy_pairs(5), 0, 5)
    assert batch.sites["mlp.1"].gradient.abs().max() > 0

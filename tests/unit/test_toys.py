"""Known answers: toys on which attribution scores and edges can be worked out in another way."""

from dataclasses import replace

import pytest
import torch

from circuitflow.attribution.cached import Cached
from circuitflow.attribution.changes import changes_of, differing, effects_of
from circuitflow.attribution.ends import End
from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.attribution.pullback import Into, edge_effects
from circuitflow.attribution.scores import score_pairs
from circuitflow.models.running import run
from tests.fixtures.attribution_toy import (
    METRIC,
    cached_sites,
    cut,
    identity_dictionary,
    metric_with,
    toy_dictionary,
    toy_pairs,
)

SEQUENTIAL_AND_PARALLEL = ["llama", "gpt_neox"]
ARCHITECTURES = [*SEQUENTIAL_AND_PARALLEL, "gpt2", "gemma2"]
WIDTH = 16


def totals(dictionary, cached, pairs) -> torch.Tensor:
    """Effects summed over positions, (pairs, d_dict + 1), the error last."""
    effects = effects_of(changes_of(dictionary, cached, pairs), dictionary.W_dec)
    total = torch.zeros(len(pairs), dictionary.d_dict + 1, dtype=torch.float64)
    return total.index_put_((effects.pair, effects.node), effects.effect, accumulate=True)


def end_at(site, dictionary, features) -> End:
    """Some features and the error, summed over positions."""
    node = torch.cat([features, torch.tensor([ERROR])])
    return End(site, dictionary, node, torch.full_like(node, SUMMED))


def edges_between(lm, pairs, up, down, at_up, at_down) -> torch.Tensor:
    """Edges of a run with these two sites alone: (pairs, up nodes, down nodes and the rest)."""
    into = Into(down.site, (up,), down, (up.site, down.site), False, METRIC)
    return edge_effects(lm, pairs, into, {up.site: at_up, down.site: at_down})[up.site]


class Linear:
    """m = Σ_pos x·v over positions after one linear map that mixes positions causally: y = L x A."""

    def __init__(self, pairs) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        pos = pairs.mask.shape[1]
        self.mix, self.map, self.readout = draw(pos, pos).tril(), draw(WIDTH, WIDTH), draw(WIDTH)
        self.clean, other = draw(len(pairs), pos, WIDTH), draw(len(pairs), pos, WIDTH)
        counted = differing(pairs)[..., None]
        self.patched = torch.where(counted, other, self.clean)
        self.reads = torch.zeros(len(pairs), pos, dtype=torch.float64)
        self.reads[torch.arange(len(pairs)), pairs.position] = 1

    def down(self, x):
        return torch.einsum("ts,bsd,de->bte", self.mix, x, self.map)

    def metric(self, x):
        return torch.einsum("bte,e,bt->b", self.down(x), self.readout, self.reads)

    def cached(self, x, of) -> Cached:
        value = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(of(value).sum(), value)
        return Cached(x, self.patched, gradient)


@pytest.fixture
def linear():
    pairs = toy_pairs()
    model = Linear(pairs)
    return pairs, model, model.cached(model.clean, model.metric)


def test_linear_model_scores_are_exact_patching(linear):
    """And integrated gradients are the same, since the gradient is constant."""
    pairs, model, cached = linear
    dictionary = toy_dictionary("resid.0", WIDTH)
    scores = totals(dictionary, cached, pairs)
    pair, position = differing(pairs).nonzero(as_tuple=True)
    codes = [dictionary.encode(x[pair, position], position).dense() for x in (model.clean, model.patched)]
    errors = [
        x[pair, position] - f @ dictionary.W_dec - dictionary.b_dec
        for x, f in zip((model.clean, model.patched), codes, strict=True)
    ]
    baseline = model.metric(model.clean)
    for node in range(dictionary.d_dict + 1):
        x = model.clean.clone()
        if node == dictionary.d_dict:
            x[pair, position] += errors[1] - errors[0]
        else:
            x[pair, position] += (codes[1] - codes[0])[:, node, None] * dictionary.W_dec[node]
        assert torch.allclose(scores[:, node], model.metric(x) - baseline, atol=1e-12)


def test_linear_model_scores_sum_to_the_difference_of_the_metric(linear):
    pairs, model, cached = linear
    expected = model.metric(model.patched) - model.metric(model.clean)
    for dictionary in (toy_dictionary("resid.0", WIDTH), identity_dictionary("resid.0", WIDTH)):
        assert torch.allclose(totals(dictionary, cached, pairs).sum(1), expected, atol=1e-12)


def test_linear_model_edges_are_matrix_products(linear, random_lm, monkeypatch):
    """Between two identity dictionaries, w(u→d) = Σ_t,s ∂m/∂y[t,d] · L[t,s] · A[u,d] · Δx[s,u]."""
    pairs, model, at_up = linear
    at_down = model.cached(
        model.down(model.clean), lambda y: torch.einsum("bte,e,bt->b", y, model.readout, model.reads)
    )
    leaf = model.clean.clone().requires_grad_()
    fake = type("Run", (), {"sites": {"resid.0": leaf, "resid.1": model.down(leaf)}})
    monkeypatch.setattr("circuitflow.attribution.pullback.run", lambda *_, **__: fake)
    up, down = (
        end_at(site, identity_dictionary(site, WIDTH), torch.arange(WIDTH)) for site in ("resid.0", "resid.1")
    )
    weights = edges_between(random_lm("llama"), pairs, up, down, at_up, at_down)
    change = model.patched - model.clean
    expected = torch.einsum("btd,ts,ud,bsu->bud", at_down.gradient, model.mix, model.map, change)
    assert torch.allclose(weights[:, :WIDTH, :WIDTH], expected, atol=1e-12)
    assert not weights[:, :, WIDTH:].any()
    assert not weights[:, WIDTH].any()


def test_quadratic_metric_midpoint_is_exact_and_atp_off_by_the_curvature(linear):
    pairs, model, _ = linear
    generator = torch.Generator().manual_seed(5)
    shape = model.clean.shape[1:]
    hessian = torch.randn(*shape, *shape, generator=generator, dtype=torch.float64)
    hessian = hessian + hessian.permute(2, 3, 0, 1)
    curve = (
        torch.einsum("bsd,sdte,bte->b", model.patched - model.clean, hessian, model.patched - model.clean) / 2
    )

    def metric(x):
        return torch.einsum("bsd,sdte,bte->b", x, hessian, x) / 2 * 1.0

    dictionary = toy_dictionary("resid.0", WIDTH)
    middle = model.cached((model.clean + model.patched) / 2, metric).gradient
    at_clean = model.cached(model.clean, metric).gradient
    difference = metric(model.patched) - metric(model.clean)
    # The metric reads every position, so every position may count.
    everywhere = replace(
        pairs,
        position=torch.full_like(pairs.position, pairs.mask.shape[1] - 1),
        mask=torch.ones_like(pairs.mask),
    )
    sums = [
        totals(dictionary, Cached(model.clean, model.patched, gradient), everywhere).sum(1)
        for gradient in (middle, at_clean)
    ]
    assert torch.allclose(sums[0], difference, atol=1e-10)
    assert torch.allclose(sums[1] + curve, difference, atol=1e-10)
    assert (curve.abs() > 1).all()


def test_identity_dictionary_has_no_error(random_lm):
    pairs = toy_pairs()
    cached = cached_sites(random_lm("llama"), pairs, ["resid.0"])["resid.0"]
    dictionary = identity_dictionary("resid.0", WIDTH)
    changes = changes_of(dictionary, cached, pairs)
    assert not changes.error(dictionary.W_dec).any()
    assert totals(dictionary, cached, pairs)[:, -1].abs().max() < 1e-13


def test_clean_equal_to_patch_scores_zero(random_lm):
    lm, pairs = random_lm("llama"), toy_pairs()
    same = replace(pairs, patch=pairs.clean)
    cached = cached_sites(lm, same, ["resid.0", "resid.1"])
    up, down = (end_at(site, toy_dictionary(site, WIDTH), torch.arange(5)) for site in cached)
    assert not totals(up.dictionary, cached["resid.0"], same).any()
    assert not edges_between(lm, same, up, down, cached["resid.0"], cached["resid.1"]).any()


class Splice:
    """A dictionary in the model's two passes: features and error are leaves, gradients pass through x."""

    def __init__(self, dictionary) -> None:
        self.dictionary = dictionary

    def __call__(self, x):
        place = torch.arange(x.shape[1]).expand(x.shape[:2]).reshape(-1)
        codes = self.dictionary.encode(x.detach().reshape(-1, x.shape[2]), place)
        self.features = codes.dense().view(*x.shape[:2], -1).requires_grad_()
        decoded = self.features @ self.dictionary.W_dec + self.dictionary.b_dec
        self.error = (x - decoded).detach().requires_grad_()
        spliced = decoded + self.error
        return spliced + x - x.detach()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scoring_is_splicing_every_dictionary_into_the_model(random_lm, architecture):
    lm, pairs = random_lm(architecture), toy_pairs()
    sites = ["embed", "resid.0", "attn.1", "mlp.1", "resid.1"]
    dictionaries = {site: toy_dictionary(site, lm.width(site), seed=seed) for seed, site in enumerate(sites)}
    cached = cached_sites(lm, pairs, sites)
    values = []
    for tokens in (pairs.patch, pairs.clean):
        splices = {site: Splice(dictionary) for site, dictionary in dictionaries.items()}
        with torch.enable_grad():
            last = run(lm, tokens, pairs.mask, replace=splices, grad=True).last
            logits = lm.unembed(last[torch.arange(len(pairs)), pairs.position])
            m = METRIC(logits, pairs.right, pairs.wrong).sum()
        values.append({site: (splice.features, splice.error) for site, splice in splices.items()})
    patched, clean = values
    for site in sites:
        gradients = torch.autograd.grad(m, clean[site], retain_graph=True)
        real = pairs.mask[..., None]
        features, error = (
            gradient * (after - before) * real
            for gradient, after, before in zip(gradients, patched[site], clean[site], strict=True)
        )
        expected = torch.cat([features, error.sum(-1, keepdim=True)], 2).sum(1)
        assert expected.abs().max() > 1e-3
        assert torch.allclose(totals(dictionaries[site], cached[site], pairs), expected, atol=1e-12)


@pytest.mark.parametrize("architecture", SEQUENTIAL_AND_PARALLEL)
def test_midpoint_gradients_conserve_the_effect_of_patching_a_site(random_lm, architecture):
    """Σ features + error = m(site alone patched) − m(clean); at resid and embed, full cuts, that is m_p − m_c."""
    lm, pairs = random_lm(architecture), toy_pairs()
    steps = 64
    whole = metric_with(lm, replace(pairs, clean=pairs.patch)) - metric_with(lm, pairs)
    for site, full_cut in (("embed", True), ("resid.0", True), ("attn.0", False), ("mlp.1", False)):
        cached = cached_sites(lm, pairs, [site])[site]
        gradient = torch.zeros_like(cached.gradient)
        for step in range(steps):
            share = (step + 0.5) / steps
            point = (1 - share) * cached.clean + share * cached.patched
            this = run(
                lm,
                pairs.clean,
                pairs.mask,
                capture=[site],
                stop_at="resid.1",
                replace={site: lambda _, x=point: x},
                grad=True,
            )
            logits = lm.unembed(this.last[torch.arange(len(pairs)), pairs.position])
            m = METRIC(logits, pairs.right, pairs.wrong).sum()
            gradient += torch.autograd.grad(m, this.sites[site])[0] / steps
        alone = metric_with(lm, pairs, replace={site: lambda _, x=cached.patched: x}) - metric_with(lm, pairs)
        sums = totals(toy_dictionary(site, WIDTH), replace(cached, gradient=gradient), pairs).sum(1)
        assert torch.allclose(sums, alone, rtol=0, atol=1e-3 * whole.abs().max())
        assert torch.allclose(alone, whole) is full_cut


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_edges_conserve_the_score_of_every_upstream_node(random_lm, architecture):
    lm, pairs = random_lm(architecture), toy_pairs()
    for up_site, down_site in (("embed", "resid.0"), ("resid.0", "resid.1"), ("embed", "resid.1")):
        cached = cached_sites(lm, pairs, [up_site, down_site])
        up = end_at(up_site, toy_dictionary(up_site, WIDTH, seed=1), torch.arange(24))
        down = end_at(down_site, toy_dictionary(down_site, WIDTH, seed=2), torch.tensor([1, 4, 6, 11, 20]))
        weights = edges_between(lm, pairs, up, down, cached[up_site], cached[down_site])
        scores = totals(up.dictionary, cached[up_site], pairs)
        assert scores[:, -1].abs().min() > 1e-4
        assert torch.allclose(weights.sum(2), scores, rtol=1e-10, atol=1e-12)


def test_edges_to_the_pool_do_not_depend_on_the_pool(random_lm):
    lm, pairs = random_lm("llama"), toy_pairs()
    cached = cached_sites(lm, pairs, ["resid.0", "resid.1"])
    up, down = (end_at(site, toy_dictionary(site, WIDTH), torch.arange(24)) for site in cached)
    small = end_at("resid.1", down.dictionary, torch.tensor([2, 5, 9]))
    full = edges_between(lm, pairs, up, down, *cached.values())
    part = edges_between(lm, pairs, up, small, *cached.values())
    assert torch.allclose(part[..., :3], full[..., small.features], atol=1e-14)
    assert torch.allclose(part[..., 3], full[..., 24], atol=1e-14)
    others = torch.tensor([f for f in range(24) if f not in (2, 5, 9)])
    assert torch.allclose(part[..., 4], full[..., others].sum(-1), atol=1e-14)


def test_unpaired_scores_and_edges_are_conserved_too(random_lm):
    lm, pairs = random_lm("llama"), toy_pairs(paired=False)
    cached = cached_sites(lm, pairs, ["resid.0", "resid.1"])
    up, down = (end_at(site, toy_dictionary(site, WIDTH), torch.arange(24)) for site in cached)
    scores = totals(up.dictionary, cached["resid.0"], pairs)
    weights = edges_between(lm, pairs, up, down, *cached.values())
    assert torch.allclose(weights.sum(2), scores, rtol=1e-10, atol=1e-12)
    taken_away = (
        cached["resid.0"].gradient * (up.dictionary.b_dec - cached["resid.0"].clean) * pairs.mask[..., None]
    )
    assert torch.allclose(scores.sum(1), taken_away.sum((1, 2)), atol=1e-12)


def test_mean_scores_conserve_over_pairs(random_lm):
    """The stage's own tables add up as single pairs do."""
    lm, pairs = random_lm("llama"), toy_pairs()
    cached = cached_sites(lm, pairs, ["resid.0"])["resid.0"]
    dictionary = toy_dictionary("resid.0", WIDTH)
    table = score_pairs(dictionary, "resid.0", cut(pairs, {"resid.0": cached}, 4), pairs).nodes
    whole = (cached.gradient * (cached.patched - cached.clean)).sum((1, 2)).mean()
    assert torch.isclose(torch.tensor(table["score"].sum()), whole)

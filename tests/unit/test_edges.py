"""Edges: conserved for every list of sites, finite differences, exact in linear models."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from circuitflow.attribution.changes import changes_of
from circuitflow.attribution.ends import End, sources_of, targets_of
from circuitflow.attribution.exact_edges import exact_effects
from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.attribution.paths import Blocks, Way, neighbours, way_into
from circuitflow.attribution.pullback import Into, edge_effects, linked, pull_back
from circuitflow.dictionaries.dictionary import Skip
from tests.fixtures.attribution_toy import METRIC as OF_TOY
from tests.fixtures.attribution_toy import (
    cached_sites,
    cut,
    metric_with,
    toy_dictionary,
    toy_pairs,
)

EVERY = ["embed", "attn.0", "mlp.0", "resid.0", "attn.1", "mlp.1", "resid.1"]
LISTS = {
    "residual": ["resid.0", "resid.1"],
    "every": EVERY,
    "sublayers": ["attn.0", "mlp.0", "attn.1", "mlp.1"],
    "mlp": ["mlp.0", "mlp.1"],
    "heads": ["embed", "z.0", "attn.0", "z.1", "mlp.1"],
    "holes": ["embed", "mlp.0", "attn.1", "resid.1"],
}
MODELS = ["llama", "gpt2", "gpt_neox", "gemma2"]


def named(random_lm, model):
    """A random model; "sequential" is GPT-NeoX with one sublayer after the other."""
    settings = {"use_parallel_residual": False} if model == "sequential" else {}
    return random_lm("gpt_neox" if settings else model, **settings)


def end_of(lm, site, number, positions="sum", pool=24):
    """An end with the first ``pool`` features and the error, or some of these at every position."""
    dictionary = toy_dictionary(site, lm.width(site), seed=number, skip=Skip((2,)) if number == 1 else Skip())
    features = torch.tensor([*range(pool), ERROR])
    if positions != "none":
        return End(site, dictionary, features, torch.full_like(features, SUMMED))
    place = torch.arange(6)
    return End(site, dictionary, features.repeat_interleave(6), place.repeat(len(features)))


def into_all(lm, sites, positions="sum", pool=24):
    """What edges into every site and into the metric are computed from."""
    ends = {site: end_of(lm, site, number, positions, pool) for number, site in enumerate(sites)}
    blocks = Blocks(lm.n_layers, lm.arch.parallel)
    found = {}
    for down, ups in neighbours(sites, blocks).items():
        found[down] = Into(
            down,
            tuple(ends[up] for up in ups),
            ends.get(down),
            tuple(sites),
            way_into(down, sites, blocks),
            OF_TOY,
            positions,
        )
    return ends, found


def own(end, cached, pairs, positions="sum"):
    """AtP effects of an end's nodes, (batch, nodes)."""
    sources = sources_of(end, changes_of(end.dictionary, cached[end.site], pairs, positions))
    return sources.effects(cached[end.site].gradient[None])[..., 0]


@pytest.mark.parametrize("positions", ["sum", "none", "last"])
@pytest.mark.parametrize("sites", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("model", [*MODELS, "sequential"])
def test_edges_are_conserved(random_lm, model, sites, positions):
    """Over all downstream nodes, rests and the metric, an upstream node's weights sum to its own effect."""
    lm = named(random_lm, model)
    pairs, pool = toy_pairs(), 5 if positions == "none" else 24
    cached = cached_sites(lm, pairs, sites)
    ends, into = into_all(lm, sites, positions, pool)
    total = dict.fromkeys(sites, 0)
    for one in into.values():
        for site, weights in edge_effects(lm, pairs, one, cached, nodes_at_once=40).items():
            total[site] = total[site] + weights.sum(2)
    for site in sites:
        expected = own(ends[site], cached, pairs, positions)
        reads_token = site == "embed" or (site == "mlp.0" and lm.arch.parallel)
        same_at_last = positions == "last" and reads_token  # both prompts end with the same token
        assert same_at_last or expected.abs().max() > 1e-6
        assert torch.allclose(torch.as_tensor(total[site]), expected, atol=1e-11), site


@pytest.fixture(params=[*MODELS, "sequential"])
def toy(request, random_lm):
    """Model, pairs, ends and everything that leads into a site, for the list of every site."""
    lm = named(random_lm, request.param)
    pairs = toy_pairs(4)
    ends, into = into_all(lm, EVERY)
    return lm, pairs, ends, into, cached_sites(lm, pairs, EVERY)


def test_edges_are_finite_differences(toy):
    """Each upstream node is moved along its change, the other neighbours held; what each node passes on is read."""
    lm, pairs, ends, into, cached = toy
    step = 1e-5
    for down in ("mlp.0", "resid.0", "attn.1", "mlp.1", "resid.1"):
        weights = edge_effects(lm, pairs, into[down], cached)
        targets = targets_of(ends[down], cached[down], pairs)
        reading = targets.cotangents(torch.arange(26), cached[down].clean)
        for up in into[down].ups:
            sources = sources_of(up, changes_of(up.dictionary, cached[up.site], pairs))
            for node in (0, 7, 24):
                direction = torch.zeros_like(cached[up.site].clean)
                direction[sources.pair, sources.position] = sources.rows(node)
                values = [
                    linked(
                        lm,
                        pairs,
                        into[down],
                        cached,
                        {up.site: cached[up.site].clean + sign * step * direction},
                    ).sites[down]
                    for sign in (1, -1)
                ]
                slope = (values[0] - values[1]) / (2 * step)
                expected = torch.einsum("nbtd,btd->bn", reading, slope)
                assert torch.allclose(weights[up.site][:, node], expected, rtol=1e-5, atol=1e-8)
            errors = weights[up.site][:, 24]
            assert errors[:, 24].abs().max() > 1e-6  # error to error
            assert errors[:, :24].abs().max() > 1e-6  # error to features


def test_closed_forms_are_products(toy):
    """Edges into a block's output, where both sublayers are in the list, are those of a pass through the block."""
    lm, pairs, _, into, cached = toy
    for down in ("resid.0", "resid.1"):
        assert into[down].way is Way.ADDED
        closed = edge_effects(lm, pairs, into[down], cached)
        for way in (Way.BY_TOKEN, Way.MIXING):
            passed = edge_effects(lm, pairs, replace(into[down], way=way), cached)
            for site, weights in closed.items():
                assert torch.allclose(weights, passed[site], atol=1e-13)


@pytest.mark.parametrize("positions", ["sum", "none"])
def test_tokens_share_products_where_no_attention_lies_between(random_lm, positions):
    """Fewer rows, the same edges."""
    rows = {True: 0, False: 0}
    for model, down in product((*MODELS, "sequential"), ("mlp.0", "mlp.1")):
        lm, pairs = named(random_lm, model), toy_pairs()
        cached = cached_sites(lm, pairs, EVERY)
        ends, all_into = into_all(lm, EVERY, positions, 24 if positions == "sum" else 5)
        into = all_into[down]
        assert into.way is Way.BY_TOKEN
        targets = targets_of(ends[down], cached[down], pairs, positions)
        for by_token in rows:
            rows[by_token] += len(targets.shared(by_token))
        shared = edge_effects(lm, pairs, into, cached)
        by_pair = edge_effects(lm, pairs, replace(into, way=Way.MIXING), cached)
        for site, weights in shared.items():
            assert weights.abs().max() > 1e-6
            assert torch.allclose(weights, by_pair[site], atol=1e-13)
    assert rows[True] < rows[False]


def test_batched_products_are_one_by_one(toy):
    lm, pairs, ends, into, cached = toy
    this = linked(lm, pairs, into["mlp.1"], cached)
    leaves = [this.sites[up.site] for up in into["mlp.1"].ups]
    targets = targets_of(ends["mlp.1"], cached["mlp.1"], pairs)
    cotangents = targets.cotangents(targets.present(), this.sites["mlp.1"])
    assert len(cotangents) > 10
    batched = pull_back(this.sites["mlp.1"], leaves, cotangents, keep_graph=True)
    for index, cotangent in enumerate(cotangents):
        single = torch.autograd.grad(this.sites["mlp.1"], leaves, cotangent, retain_graph=True)
        for together, alone in zip(batched, single, strict=True):
            assert torch.allclose(together[index], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("positions", ["sum", "none"])
def test_small_products_and_batches_change_nothing(random_lm, positions):
    lm, pairs = random_lm("llama"), toy_pairs()
    cached = cached_sites(lm, pairs, EVERY)
    into = into_all(lm, EVERY, positions, 4)[1]["mlp.1"]
    whole = edge_effects(lm, pairs, into, cached)
    for site, weights in edge_effects(lm, pairs, into, cached, nodes_at_once=1).items():
        assert torch.allclose(weights, whole[site], atol=1e-13)
    for batch in cut(pairs, cached, 4):
        for site, weights in edge_effects(lm, batch.pairs, into, batch.sites).items():
            assert torch.allclose(weights, whole[site][batch.start : batch.stop], atol=1e-12)


def test_positions_sum_to_what_is_summed(random_lm):
    lm, pairs = random_lm("llama"), toy_pairs()
    cached = cached_sites(lm, pairs, EVERY)
    for down in ("attn.1", "resid.1", "metric"):
        together = edge_effects(lm, pairs, into_all(lm, EVERY)[1][down], cached)
        apart = edge_effects(lm, pairs, into_all(lm, EVERY, "none")[1][down], cached)
        for site, weights in together.items():
            ups, downs = weights.shape[1], weights.shape[2] - 1
            each = apart[site][:, :, : downs * 6 or 1]
            each = each.view(len(pairs), ups, 6, -1, 6 if downs else 1).sum((2, 4))
            assert torch.allclose(each, weights[:, :, : downs or 1], atol=1e-12)


def test_what_downstream_nodes_pass_on_sums_to_the_gradient(toy):
    _, pairs, ends, _, cached = toy
    for site in ("attn.0", "resid.1"):
        some = replace(ends[site], feature=torch.tensor([3, 8, 9, ERROR]), position=torch.full((4,), SUMMED))
        targets = targets_of(some, cached[site], pairs)
        total = targets.cotangents(torch.arange(5), cached[site].clean).sum(0)
        expected = torch.zeros_like(total)
        expected[targets.pair, targets.position] = cached[site].gradient[targets.pair, targets.position]
        assert torch.allclose(total, expected, atol=1e-13)


def test_skipped_tokens_have_an_error_and_no_features(toy):
    """Position 2 of attn.0 is skipped: there the error passes the whole gradient on."""
    _, pairs, ends, _, cached = toy
    targets = targets_of(ends["attn.0"], cached["attn.0"], pairs)
    there = targets.position == 2
    assert there.any()
    assert not targets.values[there].any()
    expected = cached["attn.0"].gradient[targets.pair, targets.position][there]
    assert torch.equal(targets.error[there], expected)


def test_exact_edges_into_the_metric_are_reruns(random_lm):
    """Into the metric, they are differences of m; what is not measured is empty."""
    lm, pairs = random_lm("llama"), toy_pairs(4)
    cached = cached_sites(lm, pairs, EVERY)
    ends, into = into_all(lm, EVERY)
    exact = exact_effects(lm, pairs, into["metric"], cached, budget=3)["resid.1"]
    sources = sources_of(ends["resid.1"], changes_of(ends["resid.1"].dictionary, cached["resid.1"], pairs))
    for node in (24, 0, 1):  # the error comes first
        moved = cached["resid.1"].clean.clone()
        moved[sources.pair, sources.position] += sources.rows(node)
        change = metric_with(lm, pairs, start=("resid.1", moved)) - metric_with(lm, pairs)
        assert torch.allclose(exact[:, node, 0], change, atol=1e-12)
    assert exact[:, 2:24].isnan().all()
    assert exact_effects(lm, pairs, into["mlp.1"], cached, budget=25)["attn.1"].isfinite().all()


def test_exact_edges_sum_to_the_change_of_the_downstream_site(random_lm):
    """Over downstream nodes and the rest: g · (what moving the upstream node does to the vector downstream)."""
    lm, pairs = random_lm("gpt2"), toy_pairs(4)
    cached = cached_sites(lm, pairs, EVERY)
    ends, into = into_all(lm, EVERY, pool=3)
    exact = exact_effects(lm, pairs, into["mlp.1"], cached, budget=2)["resid.0"]
    up = ends["resid.0"]
    sources = sources_of(up, changes_of(up.dictionary, cached["resid.0"], pairs))
    clean = linked(lm, pairs, into["mlp.1"], cached).sites["mlp.1"]
    for node in (3, 0):
        moved = cached["resid.0"].clean.clone()
        moved[sources.pair, sources.position] += sources.rows(node)
        change = linked(lm, pairs, into["mlp.1"], cached, {"resid.0": moved}).sites["mlp.1"] - clean
        expected = (cached["mlp.1"].gradient * change)[..., :].sum((1, 2))
        seen = torch.zeros_like(expected).index_add_(
            0,
            sources.pair,
            (cached["mlp.1"].gradient * change)[sources.pair, sources.position].sum(1),
        )
        assert torch.allclose(seen, expected, atol=1e-12)
        assert torch.allclose(exact[:, node].sum(1), expected, atol=1e-12)


def test_small_exact_effects_are_edges(random_lm):
    """Where every feature stays active as it was, exact edges of a small change are edges."""
    lm, pairs = random_lm("llama"), toy_pairs(4)
    cached = cached_sites(lm, pairs, EVERY)
    near = {
        site: replace(one, patched=one.clean + 1e-6 * (one.patched - one.clean))
        for site, one in cached.items()
    }
    into = into_all(lm, EVERY)[1]["mlp.1"]
    exact, first = exact_effects(lm, pairs, into, near, 25), edge_effects(lm, pairs, into, near)
    for site, weights in first.items():
        assert torch.allclose(exact[site].sum(2), weights.sum(2), rtol=1e-3, atol=1e-13)

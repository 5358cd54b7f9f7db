"""Edges: batched products are single ones are finite differences; the stage sums them over pairs and can be resumed."""

import numpy as np
import pytest
import torch

from circuitflow.attribution import edges, pullback
from circuitflow.attribution.changes import changes_of, effects_of
from circuitflow.attribution.edges import PARTIAL, score_edges
from circuitflow.attribution.pullback import End, edge_effects, pull_back, targets_of
from circuitflow.attribution.scores import score_pairs
from circuitflow.dictionaries.dictionary import Skip, save_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.running import run
from circuitflow.store.tables import read_provenance, read_table, write_table
from tests.fixtures.attribution_toy import cached_sites, cut, toy_dictionary, toy_pairs, write_gradients

WIDTH = 16
UP, DOWN = "resid.0", "resid.1"
SPLITS = ("train", "test")


def blocks_between(lm, pairs, x, grad=False):
    this = run(lm, pairs.clean, pairs.mask, start=(UP, x), capture=[UP, DOWN], grad=grad)
    return this.sites[UP], this.sites[DOWN]


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gemma2"])
def toy(request, random_lm):
    """Model, pairs, both ends with all features in the pool, and the cached tensors."""
    lm, pairs = random_lm(request.param), toy_pairs()
    ends = [
        End(site, toy_dictionary(site, WIDTH, seed=seed, skip=skip), torch.arange(24))
        for seed, (site, skip) in enumerate(((UP, Skip()), (DOWN, Skip((2,)))))
    ]
    return lm, pairs, ends, cached_sites(lm, pairs, [UP, DOWN])


def test_batched_products_are_one_by_one(toy):
    lm, pairs, (_, down), cached = toy
    x, y = blocks_between(lm, pairs, cached[UP].clean, grad=True)
    targets = targets_of(down, cached[DOWN], pairs)
    cotangents = targets.cotangents(targets.nodes, y)
    assert len(cotangents) > 10
    batched = pull_back(y, x, cotangents, keep_graph=True)
    for index, cotangent in enumerate(cotangents):
        (single,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
        assert torch.allclose(batched[index], single, rtol=1e-12, atol=1e-14)


def test_edges_are_finite_differences(toy):
    """Each upstream node is moved along its change; what each downstream node then passes on is read off."""
    lm, pairs, (up, down), cached = toy
    weights = edge_effects(lm, pairs, up, down, cached[UP], cached[DOWN])
    changes = changes_of(up.dictionary, cached[UP], pairs)
    targets = targets_of(down, cached[DOWN], pairs)
    _, y = blocks_between(lm, pairs, cached[UP].clean)
    reading = torch.stack([targets.cotangents(torch.tensor([node]), y)[0] for node in range(26)])
    values = changes.features.dense()
    step = 1e-5
    for node in (0, 3, 7, 12, 18, 24):
        moved = (
            changes.error(up.dictionary.W_dec)
            if node == 24
            else values[:, node, None] * up.dictionary.W_dec[node]
        )
        direction = torch.zeros_like(cached[UP].clean)
        direction[changes.pair, changes.position] = moved
        ends = [blocks_between(lm, pairs, cached[UP].clean + sign * step * direction)[1] for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        expected = torch.einsum("nbtd,btd->bn", reading, slope)
        assert torch.allclose(weights[:, node], expected, rtol=1e-6, atol=1e-9)
    assert weights[:, 24, 24].abs().min() > 1e-6  # error to error


def test_what_downstream_nodes_pass_on_sums_to_the_gradient(toy):
    _, pairs, (_, down), cached = toy
    some = End(down.site, down.dictionary, torch.tensor([3, 8, 9]))
    targets = targets_of(some, cached[DOWN], pairs)
    total = targets.cotangents(torch.arange(5), cached[DOWN].clean).sum(0)
    expected = torch.zeros_like(total)
    expected[targets.pair, targets.position] = cached[DOWN].gradient[targets.pair, targets.position]
    assert torch.allclose(total, expected, atol=1e-13)


def test_skipped_tokens_have_an_error_and_no_features(toy):
    """Position 2 is skipped downstream: there the error passes the whole gradient on."""
    _, pairs, (_, down), cached = toy
    targets = targets_of(down, cached[DOWN], pairs)
    there = targets.position == 2
    assert there.any()
    assert not targets.weights[there].any()
    assert torch.equal(targets.error[there], cached[DOWN].gradient[targets.pair, targets.position][there])


def test_small_products_give_the_same_edges(toy, monkeypatch):
    lm, pairs, (up, down), cached = toy
    whole = edge_effects(lm, pairs, up, down, cached[UP], cached[DOWN])
    monkeypatch.setattr(pullback, "BATCH_TOKENS", 1)
    assert torch.allclose(edge_effects(lm, pairs, up, down, cached[UP], cached[DOWN]), whole, atol=1e-13)


def test_batches_of_pairs_do_not_change_edges(toy):
    lm, pairs, (up, down), cached = toy
    whole = edge_effects(lm, pairs, up, down, cached[UP], cached[DOWN])
    for batch in cut(pairs, cached, 4):
        part = edge_effects(lm, batch.pairs, up, down, batch.sites[UP], batch.sites[DOWN])
        assert torch.allclose(part, whole[batch.start : batch.stop], atol=1e-12)


@pytest.fixture
def stage(random_lm, tmp_path, monkeypatch):
    """Runs score_edges on files, with a float32 model that is already loaded."""
    lm, pairs = random_lm("llama", "float32"), toy_pairs(7)
    monkeypatch.setattr(edges, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(edges, "load_token_pairs", lambda _: pairs)
    exact = cached_sites(random_lm("llama"), pairs, [UP, DOWN])
    inputs = {"model": tmp_path, "tokens": tmp_path, "gradients": write_gradients(tmp_path, "train", exact)}
    for seed, (side, site) in enumerate((("up", UP), ("down", DOWN))):
        dictionary = toy_dictionary(site, WIDTH, seed=seed)
        inputs[f"dictionary_{side}"] = tmp_path / f"{site}.safetensors"
        save_dictionary(inputs[f"dictionary_{side}"], dictionary.to(torch.float32))
        nodes = score_pairs(dictionary, site, cut(pairs, exact, 7), pairs).nodes
        both = {name: np.concatenate([column, column]) for name, column in nodes.items()}
        both["split"] = np.repeat(np.array(SPLITS, object), len(nodes["score"]))
        inputs[f"scores_{side}"] = tmp_path / f"{site}.parquet"
        write_table(inputs[f"scores_{side}"], both)

    def compute(folder="edges", **changed):
        place = tmp_path / "objects" / folder
        place.mkdir(parents=True, exist_ok=True)
        params = {
            "up": UP,
            "down": DOWN,
            "pool": 5,
            "batch_pairs": 3,
            "dtype": "float32",
            "compute": {"device": "cpu"},
        }
        out = Output(place, {"edges": place / "edges.parquet"}, {"stage": "score_edges"})
        score_edges(inputs, {**params, **changed}, out)
        return out.files["edges"]

    compute.exact, compute.pairs, compute.lm = exact, pairs, random_lm("llama")
    return compute


def test_the_stage_writes_every_edge_of_the_pools_and_conserves(stage):
    path = stage()
    table, said = read_table(path), read_provenance(path)
    assert len(table["weight"]) == 6 * 7
    assert said["conservation"]["relative"] < 1e-4
    ends = [
        End(site, toy_dictionary(site, WIDTH, seed=seed), torch.tensor(said["pool"][side]))
        for seed, (side, site) in enumerate((("up", UP), ("down", DOWN)))
    ]
    exact = edge_effects(stage.lm, stage.pairs, *ends, stage.exact[UP], stage.exact[DOWN])
    assert np.allclose(table["weight"], exact.mean(0).ravel(), rtol=1e-3, atol=1e-5)
    assert np.allclose(table["se"], exact.std(0).ravel() / 7**0.5, rtol=1e-3, atol=1e-5)
    assert set(table["n"]) == {7}
    last = {name: table[name][-1] for name in ("up_kind", "up_feature", "down_kind", "down_feature")}
    assert last == {"up_kind": "error", "up_feature": -1, "down_kind": "rest", "down_feature": -2}


def test_the_pool_is_the_top_of_the_training_scores(stage):
    effects = effects_of(
        changes_of(toy_dictionary(UP, WIDTH), stage.exact[UP], stage.pairs), toy_dictionary(UP, WIDTH).W_dec
    )
    total = torch.zeros(25, dtype=torch.float64).index_add_(0, effects.node, effects.effect)
    top = total[:24].abs().argsort(descending=True)[:5]
    assert read_provenance(stage())["pool"]["up"] == sorted(top.tolist())


def test_an_interrupted_stage_goes_on_and_gives_the_same_bytes(stage, monkeypatch, tmp_path):
    calls = []

    def failing(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return edge_effects(*args)

    monkeypatch.setattr(edges, "edge_effects", failing)
    with pytest.raises(KeyboardInterrupt):
        stage("killed")
    assert (tmp_path / "objects" / "killed" / PARTIAL).is_file()
    calls = [None]
    resumed = stage("killed").read_bytes()
    assert len(calls) == 2
    monkeypatch.setattr(edges, "edge_effects", edge_effects)
    assert resumed == stage("whole").read_bytes()
    assert [file.name for file in (tmp_path / "objects" / "killed").iterdir()] == ["edges.parquet"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"down": "attn.1"}, "attn.1 is not on the residual stream"),
        ({"up": DOWN, "down": UP}, "against the order of computation"),
    ],
)
def test_impossible_ends_are_refused(stage, changed, message):
    with pytest.raises(UserError, match=message):
        stage(**changed)

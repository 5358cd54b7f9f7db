"""Node scores: hand-computed statistics, statistics over any cut of the pairs, and what is left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitflow.attribution import scores
from circuitflow.attribution.cached import Cached, trimmed
from circuitflow.attribution.changes import changes_of, difference, differing, effects_of
from circuitflow.attribution.scores import (
    check_positions,
    read_positions,
    score_decoder,
    score_nodes,
    score_pairs,
)
from circuitflow.attribution.sparse import products, sum_by
from circuitflow.dictionaries.codes import codes_from_dense
from circuitflow.dictionaries.dictionary import Skip, save_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.arrays import ArraySpec, StoreWriter
from circuitflow.store.objects import Manifest
from circuitflow.store.tables import read_provenance, read_table
from tests.fixtures.attribution_toy import cut, toy_dictionary, toy_pairs, write_gradients
from tests.fixtures.every_site import none_dictionary

SITE, WIDTH, POS = "resid.0", 8, 6


def random_cached(pairs, seed=0) -> Cached:
    """Tensors as a model could give them: equal runs before the first change, zeros at padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*pairs.mask.shape, WIDTH)
    clean, patched, gradient = (
        torch.randn(shape, generator=generator, dtype=torch.float64) * pairs.mask[..., None] for _ in range(3)
    )
    same = torch.arange(shape[1]) < pairs.first_change[:, None]
    patched = torch.where(same[..., None], clean, patched) * pairs.has_patch[:, None, None]
    return Cached(clean, patched, gradient)


def dense_effects(dictionary, cached, pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, dense: effects (pairs, pos, d_dict) of features and (pairs, pos) of errors."""
    place = torch.arange(pairs.mask.shape[1]).expand(pairs.mask.shape).reshape(-1)

    def encode(x):
        return dictionary.encode(x.reshape(-1, WIDTH), place).dense().view(*x.shape[:2], -1)

    clean, patched = encode(cached.clean), encode(cached.patched)
    errors = [
        x - (f @ dictionary.W_dec + dictionary.b_dec)
        for x, f in ((cached.clean, clean), (cached.patched, patched))
    ]
    paired = pairs.has_patch[:, None, None]
    patched, errors[1] = patched * paired, errors[1] * paired
    counted = (pairs.mask & (place.view(pairs.mask.shape) <= pairs.position[:, None]))[..., None]
    features = (cached.gradient @ dictionary.W_dec.T) * (patched - clean) * counted
    error = (cached.gradient * (errors[1] - errors[0]) * counted).sum(-1)
    return features, error


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("skip", [Skip(), Skip((2,), 3.2)])
def test_scores_are_the_dense_definition(paired, skip):
    pairs, dictionary = toy_pairs(7, paired), toy_dictionary(SITE, WIDTH, skip=skip)
    cached = random_cached(pairs)
    features, error = dense_effects(dictionary, cached, pairs)
    result = score_pairs(dictionary, SITE, cut(pairs, {SITE: cached}, 3), pairs)
    per_pair = torch.cat([features, error[..., None]], 2).sum(1).numpy()
    nodes = np.where(result.nodes["feature"] < 0, dictionary.d_dict, result.nodes["feature"])
    left_out = np.setdiff1d(np.arange(dictionary.d_dict + 1), nodes)
    assert np.allclose(result.nodes["score"], per_pair.mean(0)[nodes])
    assert np.allclose(result.nodes["se"], per_pair.std(0, ddof=1)[nodes] / 7**0.5)
    assert np.allclose(result.nodes["absolute"], np.abs(per_pair).mean(0)[nodes])
    assert not per_pair[:, left_out].any()
    assert result.nodes["kind"][-1] == "error"
    assert set(result.nodes["n"]) == {7}


def test_scores_do_not_depend_on_how_the_pairs_are_cut():
    pairs, dictionary = toy_pairs(7), toy_dictionary(SITE, WIDTH)
    cached = random_cached(pairs)
    one, all_at_once = (
        score_pairs(dictionary, SITE, cut(pairs, {SITE: cached}, size), pairs) for size in (1, 7)
    )
    for table in ("nodes", "positions", "pairs"):
        first, second = getattr(one, table), getattr(all_at_once, table)
        for name in first:
            same = np.allclose if first[name].dtype.kind == "f" else np.array_equal
            assert same(first[name], second[name])


def test_activity_counts_pairs_in_which_a_feature_is_active_in_either_run():
    pairs, dictionary = toy_pairs(6), toy_dictionary(SITE, WIDTH)
    cached = random_cached(pairs)
    result = score_pairs(dictionary, SITE, cut(pairs, {SITE: cached}, 2), pairs)
    pair, position = differing(pairs).nonzero(as_tuple=True)
    active = torch.zeros(6, dictionary.d_dict, dtype=torch.bool)
    for x in (cached.clean, cached.patched):
        codes = dictionary.encode(x[pair, position], position)
        active[pair[codes.rows()], codes.features] = True
    share = active.double().mean(0).numpy()
    features = result.nodes["kind"] == "feature"
    assert np.array_equal(result.nodes["activity"][features], share[result.nodes["feature"][features]])
    assert np.array_equal(result.nodes["feature"][features], np.flatnonzero(share))


def test_positions_are_means_within_a_case():
    pairs, dictionary = toy_pairs(6), toy_dictionary(SITE, WIDTH)
    cached = random_cached(pairs)
    features, error = dense_effects(dictionary, cached, pairs)
    table = score_pairs(dictionary, SITE, cut(pairs, {SITE: cached}, 4), pairs).positions
    short = torch.tensor([case == "short" for case in pairs.case])
    node = table["feature"][0]
    for case, here in (("short", short), ("long", ~short)):
        for kind, expected in (("feature", features[here].mean(0)[:, node]), ("error", error[here].mean(0))):
            rows = (table["case"] == case) & (table["feature"] == (node if kind == "feature" else -1))
            assert np.allclose(table["score"][rows], expected[table["position"][rows]])
            assert set(table["n"][rows]) == {3}
    total = sum(
        table["score"][(table["case"] == case) & (table["feature"] == node)].sum() / 2
        for case in ("short", "long")
    )
    assert np.isclose(total, features.sum(1).mean(0)[node])


def test_cases_of_unequal_length_have_no_positions_and_say_so():
    pairs = toy_pairs(6)
    mixed = replace(pairs, case=["one"] * 3 + ["other", "other2", "other"])
    dictionary = toy_dictionary(SITE, WIDTH)
    result = score_pairs(dictionary, SITE, cut(mixed, {SITE: random_cached(mixed)}, 6), mixed)
    assert result.unaligned == ["one"]
    assert set(result.positions["case"]) == {"other", "other2"}


def test_equal_runs_give_zeros():
    pairs, dictionary = toy_pairs(4), toy_dictionary(SITE, WIDTH)
    cached = random_cached(pairs)
    same = replace(cached, patched=cached.clean)
    result = score_pairs(dictionary, SITE, cut(pairs, {SITE: same}, 2), pairs)
    assert not result.nodes["score"].any()
    assert not result.nodes["absolute"].any()


def test_decoder_only_scores_are_means_over_pairs_and_positions():
    pairs, dictionary = toy_pairs(4), replace(toy_dictionary(SITE, WIDTH), W_enc=None)
    cached = random_cached(pairs)
    result = score_decoder(dictionary, SITE, cut(pairs, {SITE: cached}, 3), pairs)
    size = (cached.gradient @ dictionary.W_dec.T).abs()
    expected = size.sum(1) / pairs.mask.sum(1)[:, None]
    assert np.allclose(result.nodes["score"], expected.mean(0))
    assert np.allclose(result.nodes["se"], expected.std(0) / 2)
    assert "error" not in result.nodes["kind"]


def test_products_are_those_of_a_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    codes = codes_from_dense(torch.randn(9, 30, generator=generator).relu() * (torch.arange(9) != 4)[:, None])
    vectors, rows = torch.randn(9, 5, generator=generator), torch.randn(30, 5, generator=generator)
    assert torch.allclose(
        products(codes, vectors, rows), (vectors @ rows.T)[codes.rows(), codes.features], atol=1e-6
    )
    assert products(codes.where(codes.values < 0), vectors, rows).shape == (0,)


def test_difference_joins_the_active_features_of_both():
    first = codes_from_dense(torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 0]]))
    second = codes_from_dense(torch.tensor([[0.0, 5, 2, 0], [0, 0, 0, 7], [0, 0, 0, 0]]))
    joined = difference(first, second)
    assert joined.offsets.tolist() == [0, 3, 4, 5]
    assert joined.features.tolist() == [0, 1, 2, 3, 1]
    assert joined.values.tolist() == [-1, 5, 0, 7, -3]


def test_sums_by_key():
    keys, sums = sum_by(torch.tensor([7, 2, 7, 2, 3]), torch.tensor([1.0, 2, 3, 4, 5]))
    assert keys.tolist() == [2, 3, 7]
    assert sums.tolist() == [6, 5, 4]


def test_only_tokens_that_can_differ_are_encoded(monkeypatch):
    pairs, dictionary = toy_pairs(6), toy_dictionary(SITE, WIDTH)
    changes = changes_of(dictionary, random_cached(pairs), pairs)
    assert (changes.position >= pairs.first_change[changes.pair]).all()
    assert len(changes.pair) == int((pairs.position - pairs.first_change + 1).sum())
    assert len(effects_of(changes, dictionary.W_dec).node) == changes.features.nnz + len(changes.pair)


def write_method_gradients(root, split, pairs, method):
    """A store as cache_method_gradients writes it: here, three times the plain gradient."""
    values = {f"{SITE}/gradient": 3 * random_cached(pairs).gradient.numpy()}
    specs = {name: ArraySpec(array.shape, "float32") for name, array in values.items()}
    writer = StoreWriter(root / "objects" / f"{method}_{split}", specs, 100, {"method": method})
    if writer.missing():
        writer.write_shard(0, values)
    content, details = writer.finish()
    manifest = root / f"{method}_{split}.json"
    Manifest("store", f"{method}_{split}", content, {}, details).write(manifest)
    return manifest


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs score_nodes on stores and a dictionary on disk."""
    splits = {"train": toy_pairs(6), "test": toy_pairs(4, seed=5)}
    inputs = {}
    for name, pairs in splits.items():
        inputs[f"gradients_{name}"] = write_gradients(tmp_path, name, {SITE: random_cached(pairs)})
        inputs[f"tokens_{name}"] = name
    monkeypatch.setattr(scores, "load_token_pairs", splits.__getitem__)

    def compute(dictionary, method_gradients=None, **params):
        for name, pairs in compute.splits.items() if method_gradients else ():
            inputs[f"method_gradients_{name}"] = write_method_gradients(
                tmp_path, name, pairs, method_gradients
            )
        inputs["dictionary"] = tmp_path / "weights.safetensors"
        save_dictionary(inputs["dictionary"], dictionary.to(torch.float32))
        files = {name: tmp_path / f"{name}.parquet" for name in ("scores", "positions", "pairs")}
        score_nodes(inputs, {"site": SITE, **params}, Output(tmp_path, files, {"stage": "score_nodes"}))
        return files

    compute.splits = splits
    return compute


def test_the_stage_writes_both_splits(stage):
    dictionary = toy_dictionary(SITE, WIDTH)
    files = stage(dictionary)
    table = read_table(files["scores"])
    for split, pairs in stage.splits.items():
        expected = score_pairs(dictionary, SITE, cut(pairs, {SITE: random_cached(pairs)}, 4), pairs).nodes
        here = table["split"] == split
        assert np.array_equal(table["feature"][here], expected["feature"])
        assert np.allclose(table["score"][here], expected["score"], rtol=1e-4, atol=1e-6)
    said = read_provenance(files["scores"])
    assert said["stage"] == "score_nodes"
    assert said["method"].startswith("attribution patching")
    per_pair = read_table(files["pairs"])
    assert set(per_pair["pair"]) == set(range(10, 16))
    assert len(read_positions(files["positions"], "train", "long")["score"])
    with pytest.raises(UserError, match="did you mean 'long'"):
        read_positions(files["positions"], "train", "lon")


def test_the_stage_scores_a_bare_decoder(stage):
    files = stage(replace(toy_dictionary(SITE, WIDTH), W_enc=None))
    assert len(read_table(files["scores"])["feature"]) == 2 * 24
    assert len(read_table(files["pairs"])["feature"]) == 0
    assert read_provenance(files["scores"])["method"].startswith("mean |gradient")


def test_a_dictionary_of_another_width_is_refused(stage):
    with pytest.raises(UserError, match="9 wide"):
        stage(toy_dictionary(SITE, 9))


@pytest.mark.parametrize("method", ["ig", "relp"])
def test_gradients_of_another_method_take_the_place_of_the_plain_one(stage, method):
    dictionary = toy_dictionary(SITE, WIDTH)
    plain = read_table(stage(dictionary)["scores"])
    files = stage(dictionary, method_gradients=method, method=method)
    assert np.allclose(read_table(files["scores"])["score"], 3 * plain["score"], rtol=1e-5)
    assert read_provenance(files["scores"])["method"] != "attribution patching"
    other = {"ig": "relp", "relp": "ig"}[method]
    with pytest.raises(UserError, match=f"holds gradients of method {method}"):
        stage(dictionary, method_gradients=method, method=other)


def test_a_dictionary_with_an_encoder_is_scored_by_its_decoder_if_asked(stage):
    bare = read_table(stage(replace(toy_dictionary(SITE, WIDTH), W_enc=None))["scores"])
    asked = read_table(stage(toy_dictionary(SITE, WIDTH), method="decoder_only")["scores"])
    assert np.array_equal(bare["score"], asked["score"])
    with pytest.raises(UserError, match="which score_nodes does not do"):
        stage(toy_dictionary(SITE, WIDTH), method="exact")


ALIGNED = [0, 2, 4, 6]
"""Pairs of the case "short"."""


def test_nodes_at_positions_sum_to_those_over_positions():
    pairs = trimmed(toy_pairs(8)[ALIGNED])
    dictionary, cached = toy_dictionary(SITE, WIDTH), random_cached(pairs)
    features, error = dense_effects(dictionary, cached, pairs)
    batches = cut(pairs, {SITE: cached}, 3)
    none, summed = (score_pairs(dictionary, SITE, batches, pairs, positions) for positions in ("none", "sum"))
    dense = torch.cat([features, error[..., None]], 2)  # (pairs, pos, nodes), the error last as number −1
    assert np.allclose(none.nodes["score"], dense.mean(0)[none.nodes["position"], none.nodes["feature"]])
    assert (none.nodes["position"] >= 0).all()
    assert (summed.nodes["position"] == -1).all()
    assert set(none.nodes["n"]) == {4}
    for feature, score in zip(summed.nodes["feature"], summed.nodes["score"], strict=True):
        assert none.nodes["score"][none.nodes["feature"] == feature].sum() == pytest.approx(score)
    keys = set(zip(none.pairs["pair"], none.pairs["feature"], none.pairs["position"], strict=True))
    assert len(keys) == len(none.pairs["score"])
    assert none.pairs["score"].sum() == pytest.approx(summed.pairs["score"].sum())


def test_last_scores_only_the_token_where_the_answer_is_read():
    pairs, dictionary = toy_pairs(6), toy_dictionary(SITE, WIDTH)
    cached = random_cached(pairs)
    features, error = dense_effects(dictionary, cached, pairs)
    last = torch.arange(6), pairs.position
    expected = torch.cat([features[last], error[last][:, None]], 1).mean(0)
    nodes = score_pairs(dictionary, SITE, cut(pairs, {SITE: cached}, 4), pairs, "last").nodes
    assert np.allclose(nodes["score"], expected[nodes["feature"]])
    assert (nodes["position"] == -1).all()


@pytest.mark.parametrize("positions", ["last", "none"])
def test_decoder_only_scores_at_the_answer_or_at_each_position(positions):
    pairs = trimmed(toy_pairs(8)[ALIGNED])
    dictionary, cached = replace(toy_dictionary(SITE, WIDTH), W_enc=None), random_cached(pairs)
    nodes = score_decoder(dictionary, SITE, cut(pairs, {SITE: cached}, 3), pairs, positions).nodes
    size = (cached.gradient @ dictionary.W_dec.T).abs().mean(0)
    at = nodes["position"] if positions == "none" else np.full(24, 3)
    assert np.allclose(nodes["score"], size[at, nodes["feature"]])
    assert len(nodes["score"]) == (4 * 24 if positions == "none" else 24)


def test_per_position_nodes_need_prompts_that_line_up(stage):
    with pytest.raises(UserError, match="train prompts are 4 to 6 tokens long"):
        stage(toy_dictionary(SITE, WIDTH), positions="none")
    with pytest.raises(UserError, match="did you mean 'last'"):
        stage(toy_dictionary(SITE, WIDTH), positions="lst")
    stage.splits.update({name: trimmed(pairs[[0, 2]]) for name, pairs in stage.splits.items()})
    check_positions("none", stage.splits["train"])


def test_a_dictionary_without_features_has_an_error_alone(stage):
    files = stage(none_dictionary(SITE, WIDTH))
    table = read_table(files["scores"])
    assert table["kind"].tolist() == ["error", "error"]
    pairs = stage.splits["train"]
    cached = random_cached(pairs)
    whole = (cached.gradient * (cached.patched - cached.clean)).sum((1, 2)).mean()
    assert table["score"][table["split"] == "train"] == pytest.approx(float(whole), rel=1e-4)
    assert len(read_table(stage(none_dictionary(SITE, WIDTH), method="decoder_only")["scores"])["score"]) == 0

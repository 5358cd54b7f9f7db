"""Means by case and position in any batches, kept and read back; and what evaluations load in their place."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits import evaluation
from circuitflow.circuits import means as keeping
from circuitflow.circuits.evaluation import prepared
from circuitflow.circuits.interventions import complement, everything, hold, keep, nothing
from circuitflow.circuits.means import KIND, Means, cache_means, load_means
from circuitflow.circuits.replacement import Cells, drawn_prompts
from circuitflow.dictionaries.dictionary import Skip, save_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.objects import Manifest
from tests.fixtures.attribution_toy import (
    cached_sites,
    metric_with,
    toy_dictionary,
    toy_pairs,
    write_gradients,
)

WIDTH, D_DICT = 16, 24
SITES = ("embed", "mlp.0", "resid.1")


def test_means_are_over_each_case_and_position_in_any_batches():
    generator = torch.Generator().manual_seed(7)
    pairs, dictionary = toy_pairs(9), toy_dictionary("resid.0", WIDTH)
    x = torch.randn(*pairs.mask.shape, WIDTH, generator=generator, dtype=torch.float64)
    cells = Cells.over(pairs)
    assert cells.cases == ("long", "short")
    results = []
    for size in (9, 2):
        means = Means(dictionary, cells)
        for start in range(0, 9, size):
            means.add(x[start : start + size], pairs[start : start + size])
        results.append(means.values())
    long = torch.tensor([case == "long" for case in pairs.case])
    assert torch.allclose(results[0].whole[:6], x[long].mean(0))
    codes = dictionary.encode(x[long, 2], torch.full((4,), 2)).dense()
    assert torch.allclose(results[0].features.dense()[2], codes.mean(0))
    assert torch.allclose(results[0].whole, results[1].whole, equal_nan=True)
    assert torch.allclose(results[0].features.dense(), results[1].features.dense())
    assert results[0].whole[10:].isnan().all()  # "short" prompts have 4 tokens
    assert means.count.tolist() == [4.0] * 6 + [5.0] * 4 + [0.0] * 2


def test_prompts_without_means_are_refused():
    pairs, dictionary = toy_pairs(6), toy_dictionary("resid.0", WIDTH)
    means = Means(dictionary, Cells.over(pairs))
    means.add(torch.ones(*pairs.mask.shape, WIDTH, dtype=torch.float64), pairs)
    values = means.values()
    assert values.at(pairs, dictionary).slot.shape == pairs.mask.shape
    with pytest.raises(UserError, match="Case 'other' of the evaluated pairs has no training pairs"):
        values.at(replace(pairs, case=["other", *pairs.case[1:]]), dictionary)
    with pytest.raises(UserError, match="longer than every training prompt"):
        Cells(("long", "short"), 5).of(pairs)
    with pytest.raises(UserError, match="longer than every training prompt of its case"):
        values.at(replace(pairs, case=["short"] * 6), dictionary)


def test_resampled_prompts_are_others_of_the_case_and_length():
    training = toy_pairs(8)
    drawn = [drawn_prompts(training, training, seed, range(8)) for seed in range(30)]
    assert drawn[0] == drawn_prompts(training, training, 0, range(8))
    for prompts in drawn:
        assert all(training.case[a] == training.case[b] and a != b for a, b in enumerate(prompts))
    assert {prompts[0] for prompts in drawn} == {2, 4, 6}
    without = {prompts[0] for prompts in (drawn_prompts(training, training, seed) for seed in range(30))}
    assert without == {0, 2, 4, 6}


def test_resampling_takes_longer_prompts_where_none_has_the_length():
    training, wanted = toy_pairs(6), toy_pairs(2)
    same_case = replace(training, case=["all"] * 6)
    wanted = replace(wanted, case=["all"] * 2)
    for seed in range(20):
        short, long = drawn_prompts(wanted, same_case, seed)
        assert short in (0, 2, 4)
        assert long in (1, 3, 5)
    long_only = same_case[[1, 3, 5]]
    assert {drawn_prompts(wanted, long_only, seed)[0] for seed in range(20)} == {0, 1, 2}
    with pytest.raises(UserError, match=r"case 'all' has 6 tokens or more to resample"):
        drawn_prompts(wanted, same_case[[0, 2]], 0)


@pytest.fixture
def files(random_lm, tmp_path, monkeypatch):
    """Stores, dictionaries and means in files, with a model that is already loaded."""
    lm = random_lm("llama")
    splits = {"train": toy_pairs(12, seed=1), "test": toy_pairs(7, seed=2)}
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(evaluation, "load_token_pairs", splits.__getitem__)
    monkeypatch.setattr(keeping, "load_token_pairs", splits.__getitem__)
    inputs = {
        "model": tmp_path,
        "tokens_train": "train",
        "tokens_test": "test",
        "dictionaries": [],
        "means": [],
    }
    for split, pairs in splits.items():
        metric = {"clean": metric_with(lm, pairs).numpy()}
        inputs[f"gradients_{split}"] = write_gradients(
            tmp_path, split, cached_sites(lm, pairs, SITES), metric
        )
    for seed, site in enumerate(SITES):
        dictionary = toy_dictionary(site, WIDTH, D_DICT, seed=seed, skip=Skip((0,), 30.0))
        inputs["dictionaries"].append(tmp_path / f"{site}.safetensors")
        save_dictionary(inputs["dictionaries"][-1], dictionary)
        inputs["means"].append(kept_means(tmp_path, inputs, site, inputs["dictionaries"][-1]))
    params = {
        "sites": list(SITES),
        "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
        "pairs": 5,
        "ablation": "mean",
        "seed": 0,
        "dtype": "float64",
        "compute": {"device": "cpu"},
    }
    return lm, splits, inputs, params


def kept_means(root: Path, inputs, site: str, dictionary: Path) -> Path:
    folder = root / "objects" / f"means.{site}"
    folder.mkdir(parents=True)
    out = Output(folder, {}, {})
    given = {"dictionary": dictionary, "tokens": "train", "gradients": inputs["gradients_train"]}
    cache_means(given, {"site": site, "compute": {"device": "cpu"}}, out)
    assert out.content
    path = root / "means" / f"{site}.json"
    Manifest(KIND, folder.name, out.content, {}, out.details).write(path)
    return path


def circuits() -> list:
    nodes = [("embed", 3), ("embed", ERROR), ("mlp.0", 5), ("mlp.0", 6), ("resid.1", 1), ("resid.1", 9)]
    kept = keep([(*node, SUMMED) for node in nodes], SITES)
    restored = hold(nothing(SITES), [("resid.1", 3, SUMMED), ("mlp.0", ERROR, SUMMED)], "clean")
    return [nothing(SITES), kept, complement(kept), restored, everything(SITES)]


def test_kept_means_are_those_of_the_patched_inputs(files):
    lm, splits, inputs, _ = files
    train = splits["train"]
    x = cached_sites(lm, train, SITES)["mlp.0"].patched
    dictionary = toy_dictionary("mlp.0", WIDTH, D_DICT, seed=1, skip=Skip((0,), 30.0))
    expected = Means(dictionary, Cells.over(train))
    expected.add(x, train)
    got = load_means(inputs["means"][1], dictionary)
    assert got.cells == expected.cells
    assert torch.allclose(got.whole, expected.values().whole, atol=1e-6, equal_nan=True)
    assert torch.allclose(got.features.dense(), expected.values().features.dense(), atol=1e-6)
    assert not got.features.dense()[::6].any()  # position 0 is skipped
    with pytest.raises(UserError, match="are of another dictionary; run the stage cache_means again"):
        load_means(inputs["means"][1], toy_dictionary("mlp.0", WIDTH, 8))


def test_evaluations_load_means_or_compute_them(files):
    _, _, inputs, params = files
    read = prepared(inputs, params, "test").values(circuits(), 9)
    without = {name: value for name, value in inputs.items() if name != "means"}
    computed = prepared(without, params, "test").values(circuits(), 9)
    assert np.allclose(read, computed, atol=1e-12)


@pytest.mark.parametrize("ablation", ["mean", "zero", "patched", "resample"])
def test_every_ablation_keeps_the_whole_model_whole(files, ablation):
    lm, splits, inputs, params = files
    here = prepared(inputs, {**params, "ablation": ablation}, "test")
    assert len(here.prompts.pairs) == 5
    m = here.values(circuits(), 9)
    assert np.allclose(m, here.values(circuits(), 100), atol=1e-10)
    assert np.allclose(m[-1], here.full, atol=1e-5)  # the store is in float32
    chosen = here.prompts.pairs
    at = "resid.1"
    last = {
        "patched": lambda: cached_sites(lm, chosen, [at])[at].patched,
        "zero": lambda: here.sites[-1].dictionary.b_dec.expand(*chosen.mask.shape, -1),
        "mean": lambda: _mean_by_cell(lm, splits["train"], chosen),
        "resample": lambda: cached_sites(lm, splits["train"], [at])[at].patched[
            drawn_prompts(chosen, splits["train"], 0)
        ],
    }[ablation]()
    expected = metric_with(lm, chosen, start=("resid.1", last)).numpy()
    assert np.allclose(m[0], expected, atol=1e-5)
    assert len(set(np.round(m.mean(1), 6))) == len(m)


def _mean_by_cell(lm, train, chosen):
    x = cached_sites(lm, train, ["resid.1"])["resid.1"].patched
    cases = np.array(train.case)
    return torch.stack([x[cases == case].mean(0) for case in chosen.case])


def test_resampling_on_training_pairs_never_gives_a_prompt_itself(files):
    _, _, inputs, params = files
    here = prepared(inputs, {**params, "ablation": "resample", "pairs": 12}, "train")
    known, own = here.sites[-1].known("replacement"), here.sites[-1].known("patched")
    same = (known.whole[known.slot] == own.whole[own.slot]).all(2).all(1)
    assert not same.any()


def test_prompts_without_a_patched_run_cannot_take_its_values(files, monkeypatch):
    _, splits, inputs, params = files
    unpaired = replace(splits["test"], has_patch=torch.zeros(7, dtype=torch.bool))
    monkeypatch.setitem(splits, "test", unpaired)
    here = prepared(inputs, params, "test")
    held = hold(everything(SITES), [("resid.1", 3, SUMMED)], "patched")
    with pytest.raises(UserError, match="no patched prompt, so nodes cannot take its values"):
        here.values([held], 9)
    assert np.isfinite(here.values([nothing(SITES)], 9)).all()


def test_an_unknown_ablation_is_refused(files):
    _, _, inputs, params = files
    with pytest.raises(UserError, match="Ablation 'means' is unknown"):
        prepared(inputs, {**params, "ablation": "means"}, "test")


def test_kl_is_zero_for_the_whole_model(files):
    _, _, inputs, params = files
    here = prepared(inputs, {**params, "metric": {"kind": "kl", "wrong_answers": "max"}}, "test")
    m = here.values([everything(SITES), nothing(SITES)], 4)
    assert np.allclose(m[0], 0, atol=1e-12)
    assert (m[1] > 1e-4).all()

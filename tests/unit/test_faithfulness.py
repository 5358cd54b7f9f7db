"""Faithfulness, areas and intervals from numbers worked out by hand, and the stages that measure circuits."""

import numpy as np
import pytest
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits import evaluation as engine
from circuitflow.circuits import neurons
from circuitflow.circuits.ablation import run_interventions
from circuitflow.circuits.circuit import Circuit, Node, write_circuit
from circuitflow.circuits.faithfulness import evaluate_circuit
from circuitflow.circuits.neurons import neuron_scores
from circuitflow.circuits.search import JOURNAL as SEARCHED
from circuitflow.circuits.search import search_circuit
from circuitflow.circuits.statistics import (
    areas,
    bootstrap,
    faithfulness,
    outlying,
    resampled,
    spread_over_cases,
)
from circuitflow.dictionaries.dictionary import Skip, save_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_provenance, read_table, write_table
from tests.fixtures.attribution_toy import (
    cached_sites,
    metric_with,
    toy_dictionary,
    toy_pairs,
    write_gradients,
)

WIDTH, D_DICT = 16, 24
SITES = ("embed", "resid.0", "resid.1")
EVERYTHING = list(range(D_DICT))
SKIP = Skip((0,), 30.0)


def test_both_ways_of_averaging():
    circuit, nothing, full = np.array([1.0, 4.0]), np.array([0.0, 2.0]), np.array([2.0, 10.0])
    assert faithfulness(circuit, nothing, full, "ratio_of_means") == pytest.approx(3 / 10)
    assert faithfulness(circuit, nothing, full, "mean_of_ratios") == pytest.approx((1 / 2 + 2 / 8) / 2)
    assert np.isnan(faithfulness(circuit, full, full, "ratio_of_means"))


@pytest.mark.parametrize("aggregate", ["ratio_of_means", "mean_of_ratios"])
def test_intervals_hold_the_estimate_and_resample_prompts_together(aggregate):
    rng = np.random.default_rng(0)
    nothing, full = rng.normal(0, 1, 40), rng.normal(-8, 1, 40)
    circuits = np.stack([nothing + 0.7 * (full - nothing) + rng.normal(0, 0.5, 40), full, nothing])
    low, high = bootstrap(circuits, nothing, full, aggregate, 500, seed=1)
    estimate = faithfulness(circuits, nothing, full, aggregate)
    assert low[0] < estimate[0] < high[0]
    assert 0.005 < high[0] - low[0] < 0.2
    assert np.allclose([low[1:], high[1:]], [[1, 0], [1, 0]])  # M and ∅ themselves do not vary
    again = bootstrap(circuits, nothing, full, aggregate, 500, seed=1)
    assert np.array_equal(again, (low, high))


def test_areas_of_a_curve_worked_out_by_hand():
    shares, F = np.array([0.1, 0.5, 1.0]), np.array([0.0, 0.5, 1.0])
    cpr, cmd = areas(shares, F)
    assert cpr == pytest.approx(0.4 * 0.25 + 0.5 * 0.75)
    assert cmd == pytest.approx(0.4 * 0.75 + 0.5 * 0.25)
    over = np.array([[0.0, 1.0], [1.5, 1.0], [1.0, 1.0]])  # too much is as far from the model as too little
    cpr, cmd = areas(shares, over)
    assert cpr == pytest.approx([0.4 * 0.75 + 0.5 * 1.25, 0.9])
    assert cmd == pytest.approx([0.4 * 0.75 + 0.5 * 0.25, 0.0])


def test_resamples_of_one_seed_are_paired():
    rng = np.random.default_rng(0)
    nothing, full = rng.normal(0, 1, 20), rng.normal(-8, 1, 20)
    circuits = nothing + 0.5 * (full - nothing) + rng.normal(0, 0.5, (2, 20))
    both = resampled(circuits, nothing, full, "ratio_of_means", 30, seed=3)
    alone = resampled(circuits[1:], nothing, full, "ratio_of_means", 30, seed=3)
    assert both.shape == (2, 30)
    assert np.array_equal(both[1], alone[0])
    index = np.random.default_rng(3).integers(0, 20, (30, 20))[7]
    expected = (circuits[0] - nothing)[index].mean() / (full - nothing)[index].mean()
    assert both[0, 7] == pytest.approx(expected)


def test_outliers_are_far_outside_the_quartiles():
    values = np.array([0.0, 1, 2, 3, 4, 7.1, 6.9, np.nan, -3.2])
    low, high = np.nanpercentile(values, (25, 75))
    assert outlying(np.array([1.0, 2, 3, 4, 100])).tolist() == [False] * 4 + [True]
    assert outlying(values)[7]
    assert not outlying(values)[(values >= low) & (values <= high)].any()


def test_neurons_are_scored_like_features(tmp_path, random_lm, monkeypatch):
    """IE_i = Σ_positions g_i·(x_p − x_c)_i over pairs: Σ_i is what first order gives the whole site."""
    lm, pairs = random_lm("llama"), toy_pairs(12, seed=1)
    cached = cached_sites(lm, pairs, SITES)
    monkeypatch.setattr(neurons, "load_token_pairs", lambda _: pairs)
    table = neuron_scores(write_gradients(tmp_path, "train", cached), tmp_path, SITES)
    site = cached["resid.0"]
    expected = (site.gradient * (site.patched - site.clean)).sum(1).mean(0)
    here = table["site"] == "resid.0"
    assert table["feature"][here].tolist() == list(range(WIDTH))
    assert np.allclose(table["score_train"][here], expected, rtol=1e-4, atol=1e-6)
    last = neuron_scores(write_gradients(tmp_path, "last", cached), tmp_path, SITES, "last")
    rows = torch.arange(12)
    at = (site.gradient * (site.patched - site.clean))[rows, pairs.position].mean(0)
    assert np.allclose(last["score_train"][here], at, rtol=1e-4, atol=1e-6)


def test_prompts_are_spread_over_the_cases():
    cases = ["a", "a", "a", "b", "b", "c"]
    assert spread_over_cases(cases, 3) == [0, 3, 5]
    assert spread_over_cases(cases, 5) == [0, 1, 3, 4, 5]
    assert spread_over_cases(cases, 50) == [0, 1, 2, 3, 4, 5]


@pytest.fixture
def stage(random_lm, tmp_path, monkeypatch):
    """Runs evaluate_circuit on files, with a model that is already loaded."""
    exact = random_lm("llama")
    lm = random_lm("llama", "float32")
    splits = {"train": toy_pairs(12, seed=1), "test": toy_pairs(6, seed=2)}
    monkeypatch.setattr(engine, "load_model", lambda *_, **__: lm)
    for module in (engine, neurons):
        monkeypatch.setattr(module, "load_token_pairs", splits.__getitem__)
    inputs = {"model": tmp_path, "tokens_train": "train", "tokens_test": "test", "dictionaries": []}
    for split, pairs in splits.items():
        metric = {"clean": metric_with(exact, pairs).numpy()}
        inputs[f"gradients_{split}"] = write_gradients(
            tmp_path, split, cached_sites(exact, pairs, SITES), metric
        )
    for seed, site in enumerate(SITES):
        inputs["dictionaries"].append(tmp_path / f"{site}.safetensors")
        dictionary = toy_dictionary(site, WIDTH, D_DICT, seed=seed, skip=SKIP)
        save_dictionary(inputs["dictionaries"][-1], dictionary.to(torch.float32))
    inputs["nodes"] = tmp_path / "nodes.parquet"
    generator = np.random.default_rng(0)
    size = (D_DICT + 1) * len(SITES)
    write_table(
        inputs["nodes"],
        {
            "site": np.repeat(np.array(SITES, object), D_DICT + 1),
            "feature": np.tile([*EVERYTHING, ERROR], len(SITES)),
            "position": np.full(size, SUMMED),
            "score_train": generator.normal(size=size),
        },
    )
    inputs["circuit"] = tmp_path / "circuit.json"
    write_circuit(inputs["circuit"], Circuit(SITES, (Node("resid.1", "feature", 3, -4.0),), ()))
    params = {
        "sites": list(SITES),
        "ranking": "absolute",
        "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
        "positions": "sum",
        "counts": [1, 10, 30],
        "thresholds": [],
        "shares": [],
        "further_ablations": [],
        "starts": [],
        "errors": [],
        "neurons": False,
        "random_counts": [10],
        "random_draws": 3,
        "pairs": 4,
        "ablation": "mean",
        "aggregate": "ratio_of_means",
        "bootstrap": 50,
        "seed": 0,
        "batch_rows": 9,
        "dtype": "float32",
        "compute": {"device": "cpu"},
    }

    def compute(folder="evaluation", work=evaluate_circuit, **changed):
        place = tmp_path / folder
        place.mkdir(exist_ok=True, parents=True)
        files = {name: place / f"{name}.parquet" for name in ("faithfulness", "prompts", "areas", "search")}
        said = {"stage": work.__name__, "inputs": {"model": "m", "dictionaries": "d", "tokens_test": "t"}}
        work(inputs, {**params, **changed}, Output(place, files, said))
        return files["search" if work is search_circuit else "faithfulness"]

    return compute


def test_the_stage_writes_curves_baseline_and_conventions(stage):
    path = stage()
    table, said = read_table(path), read_provenance(path)
    assert table["series"].tolist().count("random") == 6  # by both averages
    assert set(table["aggregate"][table["main"]]) == {"ratio_of_means"}
    circuit = (table["series"] == "circuit") & table["main"]
    assert sorted(table["nodes"][circuit]) == [1, 1, 10, 30, 75]
    everything = circuit & (table["source"] == "all")
    assert table["F"][everything] == pytest.approx(1, abs=1e-4)
    rest = (table["series"] == "complement") & (table["source"] == "all") & table["main"]
    assert table["F"][rest] == pytest.approx(0, abs=1e-4)
    assert (table["low"] <= table["high"]).all()
    assert set(table["n"]) == {4}
    assert said["conventions"]["aggregate"] == "ratio_of_means"
    assert "embed" in said["conventions"]["start"]


def test_every_condition_has_its_curve(stage, tmp_path):
    path = stage(
        further_ablations=["zero", "patched", "resample"],
        starts=["resid.0"],
        errors=["kept", "removed", "other_removed"],
        neurons=True,
        shares=[0.01, 0.1, 1.0],
    )
    table, areas_, prompts = (
        read_table(path.with_name(f"{name}.parquet")) for name in ("faithfulness", "areas", "prompts")
    )
    chosen = table["aggregate"] == "ratio_of_means"
    curves = {
        tuple(row)
        for row in zip(
            *(table[name][chosen] for name in ("series", "ablation", "start", "errors")), strict=True
        )
    }
    assert curves == {
        *((series, "mean", "embed", "scored") for series in ("circuit", "complement", "random")),
        *(
            (series, name, "embed", "scored")
            for series in ("circuit", "complement")
            for name in ("zero", "patched", "resample")
        ),
        *((series, "mean", "resid.0", "scored") for series in ("circuit", "complement")),
        ("circuit", "mean", "embed", "kept"),
        ("circuit", "mean", "embed", "removed"),
        ("neurons", "mean", "embed", "none"),
    }
    whole = chosen & (table["source"] == "share") & (table["nodes"] == table["nodes"].max())
    assert table["F"][whole & (table["series"] == "circuit")] == pytest.approx(1, abs=1e-4)
    empties = {
        name: table["m_empty"][table["ablation"] == name][0]
        for name in ("mean", "zero", "patched", "resample")
    }
    assert len({round(value, 4) for value in empties.values()}) == 4
    late = chosen & (table["start"] == "resid.0")
    assert abs(table["m_empty"][late][0] - empties["mean"]) < 1e-4  # the deepest site decides what ∅ leaves
    assert (areas_["cpr_low"] <= areas_["cpr_high"]).all()
    assert set(areas_["points"]) == {3}
    assert len(areas_["cpr"]) == 2 * (2 * 5 + 3)
    assert len(prompts["F"]) == 4 * len(
        set(
            zip(
                *(
                    table[name][chosen & (table["series"] != "random")]
                    for name in ("series", "source", "nodes", "ablation", "start", "errors")
                ),
                strict=True,
            )
        )
    )
    assert prompts["m_circuit"][prompts["main"] & (prompts["nodes"] == 10)].mean() == pytest.approx(
        table["m_circuit"][table["main"] & (table["nodes"] == 10) & (table["series"] != "random")].mean()
    )


def test_an_ablation_that_cannot_be_done_is_left_out_and_told(stage, monkeypatch):
    unpaired = {split: toy_pairs(n, False, seed) for split, n, seed in (("train", 12, 1), ("test", 6, 2))}
    for module in (engine, neurons):
        monkeypatch.setattr(module, "load_token_pairs", unpaired.__getitem__)
    path = stage(further_ablations=["patched", "zero"])
    assert set(read_table(path)["ablation"]) == {"mean", "zero"}
    assert "no patched prompt" in read_provenance(path)["left_out"]["patched"]
    with pytest.raises(UserError, match="no patched prompt"):
        stage(ablation="patched")


def test_one_more_count_measures_that_alone(stage, monkeypatch):
    """And gives what measuring all of it anew gives."""
    rows = []
    monkeypatch.setattr(
        engine, "run_interventions", lambda *args: rows.append(len(args[-1])) or run_interventions(*args)
    )
    stage("results/m/objects/first", starts=["resid.0"], neurons=True)
    before = sum(rows)
    more = read_table(
        stage("results/m/objects/second", counts=[1, 10, 30, 40], starts=["resid.0"], neurons=True)
    )
    assert sum(rows) - before == 4 * (2 + 2 + 1)  # prompts × (both sides of either start, and neurons)
    anew = read_table(stage("elsewhere", counts=[1, 10, 30, 40], starts=["resid.0"], neurons=True))
    assert more.keys() == anew.keys()
    for name in ("F", "low", "high"):
        assert np.allclose(more[name], anew[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    before = sum(rows)
    stage("results/m/objects/third", pairs=5)
    assert sum(rows) > before


def test_a_start_outside_the_run_is_refused(stage):
    with pytest.raises(UserError, match=r"evaluation.starts names resid.5, which is no site"):
        stage(starts=["resid.5"])


@pytest.mark.parametrize(
    "changed", [{"ablation": "zero"}, {"metric": {"kind": "kl", "wrong_answers": "max"}}]
)
def test_other_conventions_run_too(stage, changed):
    table = read_table(stage(**changed))
    everything = (table["series"] == "circuit") & (table["source"] == "all")
    assert np.isfinite(table["F"][everything]).all()


def test_the_result_does_not_depend_on_the_batch_size(stage):
    one, other = (read_table(stage(f"by{size}", batch_rows=size)) for size in (5, 400))
    for name in ("F", "low", "high", "m_circuit"):
        assert np.allclose(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_an_interrupted_stage_goes_on_and_gives_the_same_bytes(stage, monkeypatch, tmp_path):
    calls = []

    def failing(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args)
        return run_interventions(*args)

    monkeypatch.setattr(engine, "run_interventions", failing)
    with pytest.raises(KeyboardInterrupt):
        stage("killed")
    (journal,) = (tmp_path / "killed").glob("*.jsonl")
    assert len(journal.read_text().splitlines()) == 3
    journal.write_text(journal.read_text()[:-4])  # a torn line
    monkeypatch.setattr(engine, "run_interventions", run_interventions)
    resumed = stage("killed").read_bytes()
    assert resumed == stage("whole").read_bytes()
    assert not journal.exists()


def search(stage, folder="searching", **changed):
    return stage(folder, search_circuit, **{"faithfulness": 0.9, "pool": D_DICT, "pairs": 6, **changed})


def test_the_search_finds_a_circuit_as_faithful_as_wanted(stage, tmp_path):
    path = search(stage)
    table, said = read_table(path), read_provenance(path)
    assert table["nodes"].tolist() == sorted(set(table["nodes"]))
    assert table["chosen"].sum() == 1
    chosen = table["chosen"].argmax()
    assert table["F"][chosen] >= 0.9
    assert (table["F"][:chosen] < 0.9).all()
    assert (table["low"] <= table["F"]).all()
    assert (table["F"] <= table["high"]).all()
    assert set(table["n"]) == {6}
    assert said["candidates"] == 75
    assert "bisected" in said["conventions"]["search"]
    assert list(tmp_path.glob("searching/*.jsonl")) == []


def test_a_search_out_of_reach_says_how_far_it_came(stage):
    with pytest.raises(UserError, match=r"faithfulness 50: the largest F is .* of 75 nodes"):
        search(stage, faithfulness=50)
    with pytest.raises(UserError, match=r"of 6 nodes"):
        search(stage, "pooled", faithfulness=50, pool=1)


def test_a_killed_search_goes_on_and_gives_the_same_bytes(stage, monkeypatch, tmp_path):
    calls = []

    def failing(*args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(args)
        return run_interventions(*args)

    monkeypatch.setattr(engine, "run_interventions", failing)
    with pytest.raises(KeyboardInterrupt):
        search(stage, "killed", batch_rows=4)
    assert len((tmp_path / "killed" / SEARCHED).read_text().splitlines()) == 5
    monkeypatch.setattr(
        engine, "run_interventions", lambda *args: calls.append(args) or run_interventions(*args)
    )
    resumed, again = search(stage, "killed", batch_rows=4).read_bytes(), len(calls)
    assert resumed == search(stage, "whole", batch_rows=4).read_bytes()
    assert len(calls) == 2 * again  # five passes before the kill were not run twice

"""Ablation by its definition, circuits whose faithfulness is known, and the stage that measures them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitflow.attribution.nodes import ERROR, SUMMED
from circuitflow.circuits import evaluation as engine
from circuitflow.circuits.ablation import (
    AblationSite,
    Cells,
    Kept,
    Means,
    Prompts,
    Replacement,
    Rows,
    ablated,
    clean_logits,
    complement,
    first_needed,
    run_circuits,
    zeros,
)
from circuitflow.circuits.circuit import Circuit, Node, write_circuit
from circuitflow.circuits.evaluation import evaluated, planned
from circuitflow.circuits.faithfulness import JOURNAL, evaluate_circuit
from circuitflow.circuits.search import JOURNAL as SEARCHED
from circuitflow.circuits.search import search_circuit
from circuitflow.circuits.statistics import bootstrap, faithfulness, spread_over_cases
from circuitflow.circuits.sweep import (
    _drawn,
    assembled,
    empty,
    growing,
    random_circuits,
    ranked_nodes,
)
from circuitflow.circuits.sweep import kept_nodes as kept_triples
from circuitflow.data.metrics import Metric
from circuitflow.dictionaries.dictionary import Skip, save_dictionary
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.journal import Journal
from circuitflow.store.tables import read_provenance, read_table, write_table
from tests.fixtures.attribution_toy import (
    METRIC,
    cached_sites,
    identity_dictionary,
    metric_with,
    toy_dictionary,
    toy_pairs,
    write_gradients,
)

WIDTH, D_DICT = 16, 24
SITES = ("embed", "resid.0", "resid.1")
EVERYTHING = list(range(D_DICT))
SKIP = Skip((0,), 30.0)


def kept_nodes(nodes, sites) -> dict:
    """Nodes of all positions, given as (site, feature)."""
    return kept_triples([(*node, SUMMED) for node in nodes], sites)


def cells_of(pairs) -> Cells:
    return Cells(tuple(sorted(set(pairs.case))), pairs.mask.shape[1])


def mean_sites(
    cached, pairs, make=lambda site, seed: toy_dictionary(site, WIDTH, D_DICT, seed=seed, skip=SKIP)
):
    found = []
    for seed, site in enumerate(cached):
        means = Means(make(site, seed), cells_of(pairs))
        means.add(cached[site].patched, pairs)
        found.append(AblationSite(site, means.dictionary, means.replacement()))
    return found


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def setting(request, random_lm):
    """Model, sites with means over 12 training pairs, and 5 test prompts."""
    lm, train, test = random_lm(request.param), toy_pairs(12, seed=1), toy_pairs(5, seed=2)
    sites = mean_sites(cached_sites(lm, train, SITES), train)
    first = cached_sites(lm, test, SITES)["embed"].clean
    return lm, sites, Prompts(test, cells_of(train).of(test), first)


def values(setting, circuits, batch_rows=1000, sites=None) -> np.ndarray:
    lm, all_sites, prompts = setting
    sites = sites or all_sites
    plan = planned(circuits, sites, prompts.pairs.mask.sum(1).tolist(), batch_rows)
    return evaluated(
        plan,
        lambda rows: run_circuits(lm, METRIC, sites, circuits, prompts, rows),
        (len(circuits), len(prompts.pairs)),
    )


def some_circuits() -> list:
    nodes = [("embed", 3), ("embed", ERROR), ("resid.0", 5), ("resid.0", 6), ("resid.1", 1), ("resid.1", 2)]
    with_error = [*nodes, ("resid.1", ERROR)]
    late = [("resid.1", feature) for feature in range(12)]
    chosen = [nodes, with_error, late, [("embed", ERROR)], [*late, *nodes]]
    kept = [kept_nodes(one, SITES) for one in chosen]
    return [*kept, *map(complement, kept)]


@pytest.mark.parametrize("places", [[-1], [1, 3], [-1, 2]], ids=["everywhere", "some", "both"])
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
def test_a_site_is_ablated_by_the_definition(setting, error, inverted, places):
    """x' = x̄ + Σ_{i∈C} (f_i − f̄_i)·W_dec[i] + 1[ε∈C]·(ε − ε̄), with everything dense; C by position."""
    _, sites, prompts = setting
    site, pairs = sites[0], prompts.pairs
    dictionary = site.dictionary
    x = prompts.first + 0.1
    nodes = [0, 5, 6, 11, 17, *([ERROR] if error else [])]
    position_of = [places[number % len(places)] for number in range(len(nodes))]
    kept = Kept(torch.tensor(nodes), torch.tensor(position_of), inverted)
    inside = torch.zeros(pairs.mask.shape[1], D_DICT + 1, dtype=torch.float64)
    for node, where in zip(nodes, position_of, strict=True):
        inside[slice(None) if where < 0 else where, node] = 1  # −1, the error, is the last column
    inside = 1 - inside if inverted else inside
    row, position = pairs.mask.nonzero(as_tuple=True)
    cell = prompts.cell[row, position]
    codes = dictionary.encode(x[row, position], position)
    mean = site.replacement.features[cell]
    mean_error = site.replacement.whole[cell] - mean @ dictionary.W_dec - dictionary.b_dec
    of_features, of_error = inside[position, :-1], inside[position, -1:]
    expected = site.replacement.whole[cell] + ((codes.dense() - mean) * of_features) @ dictionary.W_dec
    expected = expected + of_error * (dictionary.error(x[row, position], codes) - mean_error)
    rows = Rows(torch.zeros(len(pairs), dtype=torch.int64), prompts.cell, pairs.mask)
    got = ablated(x, site, [kept], rows)
    assert torch.allclose(got[row, position], expected, atol=1e-12)
    assert torch.equal(got[~pairs.mask], x[~pairs.mask])


def test_the_full_circuit_is_the_model_and_the_empty_one_its_ablation(setting):
    lm, sites, prompts = setting
    everything = kept_nodes([(site, feature) for site in SITES for feature in [*EVERYTHING, ERROR]], SITES)
    nothing = empty(SITES)
    m = values(setting, [everything, nothing, complement(everything), complement(nothing)])
    clean = metric_with(lm, prompts.pairs).numpy()
    assert np.allclose(m[0], clean, atol=1e-10)
    assert np.allclose(m[3], clean, atol=1e-12)
    assert np.allclose(m[1], m[2], atol=1e-10)
    whole = sites[-1].replacement.whole[prompts.cell].nan_to_num()
    assert np.allclose(m[1], metric_with(lm, prompts.pairs, start=("resid.1", whole)), atol=1e-12)
    assert not np.allclose(m[1], clean, atol=1e-3)
    assert np.allclose(faithfulness(m, m[1], clean, "ratio_of_means"), [1, 0, 0, 1], atol=1e-9)


def test_identity_dictionaries_keep_all_or_nothing(random_lm):
    lm, train, test = random_lm("llama"), toy_pairs(12, seed=1), toy_pairs(5, seed=2)
    sites = mean_sites(
        cached_sites(lm, train, SITES), train, lambda site, _: identity_dictionary(site, WIDTH)
    )
    prompts = Prompts(test, cells_of(train).of(test), cached_sites(lm, test, SITES)["embed"].clean)
    everything = kept_nodes([(site, feature) for site in SITES for feature in range(WIDTH)], SITES)
    m = values((lm, sites, prompts), [everything, empty(SITES)])
    clean = metric_with(lm, test).numpy()
    assert np.allclose(m[0], clean, atol=1e-10)
    assert np.allclose(faithfulness(m, m[1], clean, "ratio_of_means"), [1, 0], atol=1e-10)


def test_completeness_is_the_complement_at_one_site_with_a_linear_rest(random_lm, monkeypatch):
    """There, F(C) + F(M∖C) = 1."""
    test = toy_pairs(5, seed=2)
    lm = random_lm("llama")
    readout = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Readout(Metric):
        def __call__(self, logits, *_):
            return logits @ readout

    monkeypatch.setattr(
        "circuitflow.attribution.readout.answer_logits", lambda lm, this, *_: this.last[:, -1]
    )
    fake = type("Run", (), {})

    def linear(lm, tokens, mask, *, start, replace):
        this = fake()
        this.last = torch.where(mask[..., None], start[1], 0).sum(1, keepdim=True)
        return this

    monkeypatch.setattr("circuitflow.circuits.ablation.run", linear)
    cached = cached_sites(lm, test, ["resid.0"])
    site = mean_sites(cached, test, lambda site, _: identity_dictionary(site, WIDTH))[0]
    prompts = Prompts(test, cells_of(test).of(test), cached["resid.0"].clean)
    kept = kept_nodes([("resid.0", 2), ("resid.0", 7), ("resid.0", 8)], ("resid.0",))
    everything = kept_nodes([("resid.0", feature) for feature in range(WIDTH)], ("resid.0",))
    circuits = [kept, complement(kept), empty(("resid.0",)), everything]
    rows = [(circuit, prompt) for circuit in range(4) for prompt in range(5)]
    m = run_circuits(lm, Readout("kl", "max"), [site], circuits, prompts, rows).view(4, 5).numpy()
    part, rest = faithfulness(m[:2], m[2], m[3], "ratio_of_means")
    assert part + rest == pytest.approx(1)
    assert abs(part) > 0.01


def test_circuits_together_are_circuits_one_by_one(setting):
    circuits = some_circuits()
    together = values(setting, circuits)
    for size in (1, 3, 7):
        assert np.allclose(values(setting, circuits, batch_rows=size), together, atol=1e-11)
    assert len({round(float(m), 6) for m in together.mean(1)}) > 5


def test_passes_hold_rows_of_one_start_and_like_length(setting):
    circuits = some_circuits()
    plan = planned(circuits, setting[1], [4, 6, 4, 6, 4], 12)
    assert sorted(row for rows in plan for row in rows) == [(c, p) for c in range(10) for p in range(5)]
    assert max(map(len, plan)) == 12
    for rows in plan:
        assert len({first_needed(circuits[circuit], setting[1]) for circuit, _ in rows}) == 1
    assert {prompt for rows in plan[:2] for _, prompt in rows} == {0, 2, 4}


def test_starting_late_changes_nothing(setting):
    """A circuit that keeps nothing of a residual site is run from there; the same as running all of it."""
    lm, sites, prompts = setting
    circuits = some_circuits()
    assert [first_needed(circuit, sites) for circuit in circuits] == [0, 0, 1, 2, 0, *[0] * 5]
    got = values(setting, circuits)
    rows = [(0, prompt) for prompt in range(5)]
    for number in (2, 3):
        # a second circuit in the pass forces the start at the first site
        both = run_circuits(
            lm, METRIC, sites, [circuits[0], circuits[number]], prompts, [*rows, *((1, p) for _, p in rows)]
        )
        assert np.allclose(got[number], both[5:], atol=1e-12)


def test_untouched_sites_are_not_encoded(setting, monkeypatch):
    """The complement of a few nodes at one site leaves the others alone."""
    encoded = []
    encode = type(setting[1][0].dictionary).encode

    def counting(self, x, position):
        encoded.append(self.reads[0])
        return encode(self, x, position)

    monkeypatch.setattr(type(setting[1][0].dictionary), "encode", counting)
    values(setting, [complement(kept_nodes([("resid.0", 4)], SITES))])
    assert encoded == ["resid.0"]
    values(setting, [empty(SITES)])
    assert encoded == ["resid.0"]


def test_means_are_over_each_case_and_position_in_any_batches(setting):
    generator = torch.Generator().manual_seed(7)
    pairs, dictionary = toy_pairs(9), toy_dictionary("resid.0", WIDTH)
    x = torch.randn(*pairs.mask.shape, WIDTH, generator=generator, dtype=torch.float64)
    cells = cells_of(pairs)
    assert cells.cases == ("long", "short")
    results = []
    for size in (9, 2):
        means = Means(dictionary, cells)
        for start in range(0, 9, size):
            means.add(x[start : start + size], pairs[start : start + size])
        results.append(means.replacement())
    long = torch.tensor([case == "long" for case in pairs.case])
    assert torch.allclose(results[0].whole[:6], x[long].mean(0))
    codes = dictionary.encode(x[long, 2], torch.full((4,), 2)).dense()
    assert torch.allclose(results[0].features[2], codes.mean(0))
    assert torch.allclose(results[0].whole, results[1].whole, equal_nan=True)
    assert results[0].whole[10:].isnan().all()  # "short" prompts have 4 tokens


def test_zero_ablation_leaves_the_decoder_bias(setting):
    lm, sites, prompts = setting
    zeroed = [
        AblationSite(site.name, site.dictionary, zeros(site.dictionary, Cells(("long", "short"), 6)))
        for site in sites
    ]
    m = values(setting, [empty(SITES), complement(empty(SITES))], sites=zeroed)
    bias = sites[-1].dictionary.b_dec.expand(*prompts.cell.shape, -1)
    assert np.allclose(m[0], metric_with(lm, prompts.pairs, start=("resid.1", bias)), atol=1e-12)
    assert np.allclose(m[1], metric_with(lm, prompts.pairs), atol=1e-12)


def test_kl_is_measured_from_the_clean_run(setting):
    lm, sites, prompts = setting
    with_reference = replace(prompts, reference=clean_logits(lm, "embed", prompts))
    circuits = [complement(empty(SITES)), empty(SITES)]
    rows = [(circuit, prompt) for circuit in (0, 1) for prompt in range(5)]
    m = run_circuits(lm, Metric("kl", "max"), sites, circuits, with_reference, rows)
    assert torch.allclose(m[:5], torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert (m[5:] > 1e-3).all()


def test_prompts_without_means_are_refused(setting):
    lm, sites, prompts = setting
    cells = Cells(("long", "short"), 6)
    with pytest.raises(UserError, match="Case 'other' of the test pairs has no training pairs"):
        cells.of(replace(prompts.pairs, case=["other", *prompts.pairs.case[1:]]))
    with pytest.raises(UserError, match="longer than every training prompt"):
        Cells(("long", "short"), 5).of(prompts.pairs)
    wrong_case = replace(prompts, cell=cells.of(replace(prompts.pairs, case=["short"] * 5)))
    with pytest.raises(UserError, match="longer than every training prompt of its case"):
        run_circuits(lm, METRIC, sites, [empty(SITES)], wrong_case, [(0, prompt) for prompt in range(5)])


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


NODES = {
    "site": np.array(["embed"] * 4 + ["resid.0"] * 3 + ["resid.1"] * 3, object),
    "feature": np.array([3, 1, -1, 9, 5, -1, 7, 2, 4, -1]),
    "position": np.full(10, SUMMED),
    "score_train": np.array([-4.0, 2.0, 1.0, 0.5, 3.0, 2.0, 0.25, 1.5, 0.125, 0.0]),
}


def test_nodes_are_ranked_over_all_sites_without_those_that_do_nothing():
    ranked = ranked_nodes(NODES, SITES)
    first = [("embed", 3), ("resid.0", 5), ("embed", 1), ("resid.0", -1), ("resid.1", 2)]
    assert ranked.nodes[:5] == [(*node, SUMMED) for node in first]
    assert ("resid.1", -1, SUMMED) not in ranked.nodes
    assert ranked.strengths.tolist() == sorted(ranked.strengths, reverse=True)


def test_nodes_may_be_ranked_with_their_sign():
    ranked = ranked_nodes(NODES, SITES, "signed")
    assert ranked.nodes[0] == ("resid.0", 5, SUMMED)
    assert ranked.nodes[-1] == ("embed", 3, SUMMED)
    assert ranked.above(0.5) == ranked.top(4)
    assert [one.threshold for one in growing(ranked, [], [])] == [-4.0, -4.0]


def test_a_pool_is_the_strongest_features_of_each_site_and_the_errors():
    pooled = ranked_nodes(NODES, SITES).pooled(1)
    kept = [("embed", 3), ("resid.0", 5), ("resid.0", -1), ("resid.1", 2), ("embed", -1)]
    assert pooled.nodes == [(*node, SUMMED) for node in kept]
    assert pooled.strengths.tolist() == [4, 3, 2, 1.5, 1]


def test_nodes_of_positions_are_ranked_and_drawn_at_their_position():
    table = {
        "site": np.array(["embed"] * 7, object),
        "feature": np.array([3, 3, 1, 1, 8, -1, -1]),
        "position": np.array([4, 2, 2, 4, 2, 2, 4]),
        "score_train": np.array([4.0, 4.0, 3.0, 0.5, 0.25, 2.0, 1.0]),
    }
    ranked = ranked_nodes(table, SITES)
    assert ranked.nodes[:4] == [("embed", 3, 2), ("embed", 3, 4), ("embed", 1, 2), ("embed", -1, 2)]
    drawn = [_drawn(ranked, 4, np.random.default_rng(seed)) for seed in range(60)]
    for nodes in drawn:
        assert sorted(position for _, feature, position in nodes if feature != ERROR) == [2, 2, 4]
        assert [node for node in nodes if node[1] == ERROR] == [("embed", ERROR, 2)]
        assert {feature for _, feature, position in nodes if position == 4} <= {3, 1}
    assert len(set(map(tuple, drawn))) == 6  # 3 pairs at position 2, 2 features at position 4


def test_growing_circuits_have_each_size_once():
    found = growing(ranked_nodes(NODES, SITES), [2, 4, 50], [0.5, 0.03])
    sizes = [(one.series, one.source, one.nodes, one.threshold) for one in found]
    assert sizes[::2] == [
        ("circuit", "count", 2, 3.0),
        ("circuit", "count", 4, 2.0),
        ("circuit", "count", 9, 0.125),
    ]
    assert [one.series for one in found[1::2]] == ["complement"] * 3
    more = growing(ranked_nodes(NODES, SITES), [2], [0.3, 0.03])
    assert [(one.source, one.nodes) for one in more[::2]] == [
        ("count", 2),
        ("threshold", 5),
        ("threshold", 9),
    ]


def test_random_circuits_match_sites_and_kinds():
    ranked = ranked_nodes(NODES, SITES)
    found = random_circuits(ranked, [5, 99], draws=20, seed=0)
    assert len(found) == 40
    for one in found[:20]:
        assert {site: len(kept.feature) for site, kept in one.kept.items()} == {
            "embed": 2,
            "resid.0": 2,
            "resid.1": 1,
        }
        assert [ERROR in kept.feature for kept in one.kept.values()] == [False, True, False]
        assert set(one.kept["embed"].feature.tolist()) <= {3, 1, 9}
    assert len({tuple(one.kept["embed"].feature.tolist()) for one in found[:20]}) == 3
    again = random_circuits(ranked, [5], draws=20, seed=0)
    assert all(
        torch.equal(a.kept["embed"].feature, b.kept["embed"].feature)
        for a, b in zip(found, again, strict=False)
    )


def test_the_assembled_circuit_is_evaluated_as_it_is():
    nodes = (Node("embed", "feature", 3, -4.0), Node("resid.0", "error", -1, 2.0))
    circuit, rest = assembled(Circuit(SITES, nodes, ()), SITES)
    assert (circuit.nodes, circuit.threshold, circuit.source) == (2, 2.0, "assembled")
    assert circuit.kept["embed"].feature.tolist() == [3]
    assert circuit.kept["embed"].position.tolist() == [SUMMED]
    assert circuit.kept["resid.0"].feature.tolist() == [ERROR]
    assert rest.kept["resid.1"] == replace(circuit.kept["resid.1"], complement=True)


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
    monkeypatch.setattr(engine, "load_token_pairs", splits.__getitem__)
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
        "counts": [1, 10, 30],
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
        place.mkdir(exist_ok=True)
        files = {name: place / f"{name}.parquet" for name in ("faithfulness", "search")}
        work(inputs, {**params, **changed}, Output(place, files, {"stage": work.__name__}))
        return files["search" if work is search_circuit else "faithfulness"]

    return compute


def test_the_stage_writes_curves_baseline_and_conventions(stage):
    path = stage()
    table, said = read_table(path), read_provenance(path)
    assert table["series"].tolist().count("random") == 3
    circuit = table["series"] == "circuit"
    assert sorted(table["nodes"][circuit]) == [1, 1, 10, 30, 75]
    everything = circuit & (table["source"] == "all")
    assert table["F"][everything] == pytest.approx(1, abs=1e-4)
    rest = (table["series"] == "complement") & (table["source"] == "all")
    assert table["F"][rest] == pytest.approx(0, abs=1e-4)
    assert (table["low"] <= table["high"]).all()
    assert set(table["n"]) == {4}
    assert said["conventions"]["aggregate"] == "ratio_of_means"
    assert "embed" in said["conventions"]["start"]


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
        return run_circuits(*args)

    monkeypatch.setattr(engine, "run_circuits", failing)
    with pytest.raises(KeyboardInterrupt):
        stage("killed")
    journal = tmp_path / "killed" / JOURNAL
    assert len(journal.read_text().splitlines()) == 3
    journal.write_text(journal.read_text()[:-4])  # a torn line
    monkeypatch.setattr(engine, "run_circuits", run_circuits)
    resumed = stage("killed").read_bytes()
    assert resumed == stage("whole").read_bytes()
    assert not journal.exists()


def test_finished_passes_are_not_run_again(tmp_path):
    plan = [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]
    (tmp_path / "j").write_text(json.dumps([1.5, 2.5]) + "\n")
    seen = []

    def measure(rows):
        seen.append(rows)
        return torch.tensor([7.0, 8.0])

    assert evaluated(plan, measure, (2, 2), Journal(tmp_path / "j")).tolist() == [[1.5, 2.5], [7.0, 8.0]]
    assert seen == plan[1:]


@pytest.mark.parametrize("first", ["attn.0", "mlp.0"])
def test_evaluation_may_start_within_a_block(random_lm, first):
    """Passes then start from the tokens: all nodes kept is the model, and what skips the first site stays."""
    lm, train, test = random_lm("llama"), toy_pairs(12, seed=1), toy_pairs(5, seed=2)
    names = (first, "resid.1")
    sites = mean_sites(cached_sites(lm, train, names), train)
    prompts = Prompts(test, cells_of(train).of(test), None)
    everything = kept_nodes([(site, feature) for site in names for feature in [*EVERYTHING, ERROR]], names)
    one = kept_nodes([(names[1], feature) for feature in [*EVERYTHING, ERROR]], names)
    m = values((lm, sites, prompts), [everything, empty(names), one])
    clean = metric_with(lm, test).numpy()
    assert np.allclose(m[0], clean, atol=1e-10)
    assert not np.allclose(m[2], clean, atol=1e-4)
    assert not np.allclose(m[2], m[1], atol=1e-4)


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
        return run_circuits(*args)

    monkeypatch.setattr(engine, "run_circuits", failing)
    with pytest.raises(KeyboardInterrupt):
        search(stage, "killed", batch_rows=4)
    assert len((tmp_path / "killed" / SEARCHED).read_text().splitlines()) == 5
    monkeypatch.setattr(engine, "run_circuits", lambda *args: calls.append(args) or run_circuits(*args))
    resumed, again = search(stage, "killed", batch_rows=4).read_bytes(), len(calls)
    assert resumed == search(stage, "whole", batch_rows=4).read_bytes()
    assert len(calls) == 2 * again  # five passes before the kill were not run twice


def test_replacements_may_be_of_any_kind(setting):
    """Anything that fits the shapes can replace nodes: here the clean values, under which no circuit does harm."""
    lm, sites, prompts = setting
    pairs = prompts.pairs[[0]]
    one = Prompts(pairs, torch.arange(6)[None], prompts.first[[0]])
    cached = cached_sites(lm, pairs, SITES)
    same = []
    for site in sites:
        codes = site.dictionary.encode(cached[site.name].clean[0], torch.arange(6)).dense()
        same.append(AblationSite(site.name, site.dictionary, Replacement(cached[site.name].clean[0], codes)))
    circuits = some_circuits()
    got = run_circuits(lm, METRIC, same, circuits, one, [(number, 0) for number in range(len(circuits))])
    assert torch.allclose(got, metric_with(lm, pairs).expand(len(circuits)), atol=1e-10)

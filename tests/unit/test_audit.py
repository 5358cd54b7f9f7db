"""The audit: strata and bounds against populations that are known in full, and measured effects against passes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitflow.attribution.changes import changes_of
from circuitflow.attribution.exact import Plan, interventions, measured
from circuitflow.attribution.scores import score_pairs
from circuitflow.circuits import audit
from circuitflow.circuits.audit import audit_circuit, verdict
from circuitflow.circuits.audit_nodes import pick
from circuitflow.circuits.circuit import Circuit, Edge, Node, write_circuit
from circuitflow.circuits.strata import NAMES, estimate_sum, most_beyond, sample
from circuitflow.dictionaries.dictionary import save_dictionary
from circuitflow.jobs import Output
from circuitflow.plots.audit import draw, remark, sentences, verdicts
from circuitflow.plots.style import Style, drawing
from circuitflow.store.arrays import open_store
from circuitflow.store.journal import Journal
from circuitflow.store.tables import read_table, write_table
from tests.fixtures import synthetic_audit as made_up
from tests.fixtures.attribution_toy import METRIC, cut, toy_dictionary, toy_pairs, write_gradients
from tests.fixtures.every_site import base_of, cached_of, effects_table

SITES = ["resid.0", "resid.1"]


def drawn(sizes, errors=None, budget=6, middle=0.9, seed=0):
    sizes = np.asarray(sizes, float)
    errors = np.zeros(len(sizes), bool) if errors is None else errors
    return sample(sizes, errors, budget, middle, np.random.default_rng(seed))


def test_strata_by_hand():
    errors = np.array([False] * 7 + [True])
    found = drawn([10, 8, 1, 1, 1, 0.1, 0.1, 0.01], errors, budget=6, middle=0.95)
    assert [NAMES[i] for i in found.stratum] == ["top"] * 2 + ["middle"] * 3 + ["random"] * 2 + ["error"]
    assert {0, 1, 7} <= set(found.chosen.tolist())
    assert found.within(NAMES.index("middle")).sum() == 2
    assert len(found.chosen) == 7


def test_a_budget_for_all_measures_all_and_knows_the_sum():
    sizes = np.arange(1.0, 13)
    found = drawn(sizes, budget=30)
    assert found.chosen.tolist() == list(range(12))
    effects = -sizes
    told = estimate_sum(found, effects)
    assert told.value == told.upper == told.measured == pytest.approx(78)
    assert most_beyond(found, effects, 9.5) == 3


@pytest.mark.parametrize("middle", [0.3, 0.99])
def test_what_one_stratum_does_not_need_the_others_get(middle):
    sizes = 1 / np.arange(1.0, 30)
    for budget in (1, 5, 20, 29, 50):
        assert len(drawn(sizes, budget=budget, middle=middle).chosen) == min(budget, 29)


def test_an_estimate_by_hand():
    found = drawn([8.0, 4, 1, 1, 1, 1, 1, 1], budget=4, middle=0.6)
    here = np.where(found.stratum[found.chosen] == NAMES.index("top"), 5.0, 2.0)
    sizes = {name: found.size(NAMES.index(name)) for name in NAMES}
    assert sizes["top"] == 2
    assert estimate_sum(found, here).value == pytest.approx(2 * 5 + 6 * 2)
    assert estimate_sum(found, here).upper > 22  # what is not seen may be larger


def test_a_stratum_of_which_nothing_is_known_has_no_bound():
    found = drawn([8.0, 4, 1, 1, 1, 1], budget=1)
    told = estimate_sum(found, np.ones(len(found.chosen)))
    assert np.isinf(told.upper)


@pytest.mark.parametrize("related", [True, False])
def test_bounds_hold_as_often_as_they_say(related):
    generator, held, exact, shares = np.random.default_rng(0), 0, 0, []
    for _ in range(200):
        sizes = np.exp(2 * generator.normal(size=1500))
        noise = np.exp(generator.normal(size=1500) * (0.5 if related else 1.2))
        effects = (sizes if related else sizes**0.5) * noise
        found = sample(sizes, np.zeros(1500, bool), 120, 0.9, generator)
        told, line = estimate_sum(found, effects[found.chosen]), np.quantile(effects, 0.97)
        shares.append(told.value / effects.sum())
        held += told.upper >= effects.sum()
        exact += most_beyond(found, effects[found.chosen], line) >= (effects > line).sum()
    assert np.mean(shares) == pytest.approx(1, abs=0.05)
    assert held >= 185
    assert exact >= 188


def single(made):
    """In float32, as cached activations are."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    return replace(made, **{name: getattr(made, name).float() for name in names})


@pytest.fixture
def run(random_lm, monkeypatch, tmp_path):
    """Audits a circuit of a random model; gives tables and what they were made from."""
    lm, pairs = random_lm("llama"), toy_pairs(5)
    monkeypatch.setattr(audit, "load_model", lambda *_, **__: lm)
    monkeypatch.setattr(audit, "load_token_pairs", lambda _: pairs)
    cached = cached_of(lm, pairs, SITES)
    gradients = write_gradients(tmp_path, "base", cached)
    tables = []
    for site in SITES:
        save_dictionary(tmp_path / f"{site}.safetensors", single(toy_dictionary(site, 16)))
        scores = score_pairs(toy_dictionary(site, 16), site, cut(pairs, cached, 5), pairs).pairs
        path = tmp_path / f"{site}.pairs.parquet"
        write_table(path, {"split": np.full(len(scores["score"]), "test", object), **scores})
        tables.append(path)
    feature = int(scores["feature"][0])
    up = int(read_table(tables[0])["feature"][0])
    for down, ends in (("resid.1", [feature, -1, -2]), ("metric", [-3])):
        site = "resid.0" if down == "resid.1" else "resid.1"
        ups = [up, -1] if site == "resid.0" else [feature, -1]
        rows = [(site, a, -1, b, -1, 0.1 + 0.01 * i) for a in ups for i, b in enumerate(ends)]
        names = ("up_site", "up_feature", "up_position", "down_feature", "down_position", "weight")
        write_table(
            tmp_path / f"edges.{down}.parquet",
            {name: [row[i] for row in rows] for i, name in enumerate(names)},
        )
    nodes = (
        Node("resid.0", "feature", up, 0.5),
        Node("resid.1", "feature", feature, 0.3),
    )
    edges = (Edge(nodes[0].id, nodes[1].id, 0.1),)
    selection = {"conservation": {"resid.0": {"residual": 2e-8, "relative": 1e-7}}}
    write_circuit(tmp_path / "circuit.json", Circuit(tuple(SITES), nodes, edges, selection))

    def compute(**params):
        inputs = {
            "model": tmp_path,
            "circuit": tmp_path / "circuit.json",
            "tokens": tmp_path,
            "gradients": gradients,
            "dictionaries": [tmp_path / f"{site}.safetensors" for site in SITES],
            "pairs": tables,
            "edges": [tmp_path / f"edges.{down}.parquet" for down in ("resid.1", "metric")],
        }
        common = {
            "sites": SITES,
            "downs": ["resid.1", "metric"],
            "metric": {"kind": "logit_difference", "wrong_answers": "logsumexp"},
            "positions": "sum",
            "pairs": 4,
            "nodes": 60,
            "edges": 40,
            "inside": 0.5,
            "middle": 0.9,
            "bootstrap": 50,
            "seed": 0,
            "batch_rows": 16,
            "dtype": "float64",
            "compute": {"device": "cpu"},
        }
        files = {name: tmp_path / f"{name}.out.parquet" for name in ("summary", "nodes", "edges")}
        audit_circuit(inputs, {**common, **params}, Output(tmp_path, files, {}))
        return {name: read_table(path) for name, path in files.items()}

    compute.lm, compute.pairs, compute.cached, compute.gradients = lm, pairs, cached, gradients
    return compute


def test_nodes_are_truly_patched(run):
    nodes = run()["nodes"]
    rows = [0, 1, 2, 3]
    assert set(nodes["n"]) == {4}
    assert set(nodes["stratum"][nodes["feature"] == -1]) == {"error"}
    assert nodes["inside"].sum() == 2
    for site in SITES:
        dictionary, pairs = toy_dictionary(site, 16), run.pairs[rows]
        cached = {
            key: type(value)(*(x[rows] for x in (value.clean, value.patched, value.gradient)))
            for key, value in run.cached.items()
        }
        plan = Plan(site, dictionary, "sum", torch.ones(1, 24, dtype=torch.bool), 16)
        changes = changes_of(dictionary, cached[site], pairs)
        work = interventions(changes, plan, torch.zeros_like(plan.chosen))
        base = base_of(run.lm, pairs, cached, [site], METRIC)
        expected = effects_table(measured(base, work, plan, Journal(None)), pairs, 24).mean(0)
        here = nodes["site"] == site
        assert np.allclose(nodes["exact"][here], expected[nodes["feature"][here]], atol=1e-5)
        assert (np.abs(nodes["exact"][here]) > 1e-3).any()


def test_edges_into_the_metric_are_the_whole_effect_of_the_last_site(run):
    tables = run()
    edges, nodes = tables["edges"], tables["nodes"]
    last = edges["down_site"] == "metric"
    assert last.sum() == 2
    for feature, exact in zip(edges["up_feature"][last], edges["exact"][last], strict=True):
        known = nodes["exact"][(nodes["site"] == "resid.1") & (nodes["feature"] == feature)]
        assert exact == pytest.approx(known[0], abs=1e-5)
    assert not np.allclose(edges["exact"], edges["linear"], atol=1e-6)
    assert edges["inside"].sum() == 1


def test_the_summary_counts_what_there_is(run):
    tables = run(nodes=12)
    summary = tables["summary"]
    whole = (summary["stratum"] == "all") & (summary["what"] == "nodes")
    assert summary["measured"][whole].sum() == len(tables["nodes"]["exact"])
    assert set(summary["residual"]) == {2e-8}
    outside = whole & (summary["side"] == "outside")
    assert summary["upper"][outside][0] >= summary["estimate"][outside][0] >= 0
    assert 0 <= summary["share"][outside][0] <= summary["share_upper"][outside][0] <= 1
    assert "nodes outside carry" in verdict(summary)
    assert "lies outside, at most" in verdicts(summary)["nodes"]
    assert "(95 %), of these 4 pairs (" in verdict(summary)
    inside = tables["nodes"]["inside"]
    threshold = np.abs(tables["nodes"]["exact"][inside]).min()
    assert summary["threshold"][whole] == pytest.approx([threshold] * 2)
    assert summary["beyond"][outside][0] == (np.abs(tables["nodes"]["exact"][~inside]) > threshold).sum()
    with drawing(Style(dpi=60)):
        figure = draw(summary, tables["nodes"], tables["edges"], Style(dpi=60))
    assert figure.axes[1].get_title("left").replace("\n", " ") == verdicts(summary)["nodes"]


def test_nothing_is_bounded_where_everything_is_measured(run):
    tables = run(nodes=1000, edges=1000)
    summary = tables["summary"]
    assert "at most" not in verdict(summary)
    assert "of these 4 pairs" in verdict(summary)
    for said in (*verdicts(summary).values(), *sentences(summary)):
        assert "at most" not in said
    assert verdicts(summary)["nodes"].endswith("lies outside (all measured, for these pairs)")


def test_what_is_said_beside_a_drawing_of_the_circuit():
    summary = {name: np.array(column) for name, column in made_up.summary().items()}
    assert remark(summary) == (
        "Audit: nodes, 20\u202f% of Σ|effect| lies outside, "
        "at most 27\u202f% (95 %, for these pairs); edges, 20\u202f% of "
        "Σ|effect| lies outside, at most 27\u202f% (95 %, for these pairs); each patched alone, on 16 test pairs."
    )
    assert "5 measured nodes have a larger |effect|" in sentences(summary)[-1]
    unknown = {**summary, "share": np.full(len(summary["n"]), np.nan)}  # no unit has an effect
    assert remark(unknown) == ""
    assert [one.partition(":")[0] for one in sentences(unknown, "nats")] == ["Conservation"]
    assert "3.0e−08 nats" in sentences(unknown, "nats")[0]


def test_pairs_are_picked_from_anywhere(run):
    store = open_store(run.gradients)
    batch = pick(store, ["resid.0"], run.pairs, [4, 1], run.lm)
    length = batch.pairs.mask.shape[1]
    expected = run.cached["resid.0"].clean[[4, 1]][:, :length]
    assert torch.allclose(batch.sites["resid.0"].clean.double(), expected, atol=1e-5)
    assert batch.pairs.case == [run.pairs.case[4], run.pairs.case[1]]

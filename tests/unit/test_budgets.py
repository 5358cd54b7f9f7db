"""Contenders at equal budgets, against hand-made tables of m and hand-made circuits."""

from pathlib import Path

import numpy as np
import pytest

from circuitflow.circuits.budget_tables import compare_budgets, read_contender
from circuitflow.circuits.budgets import means_over, scored_pairs
from circuitflow.circuits.circuit import Circuit, Node, write_circuit
from circuitflow.config_validation import ComparisonSection
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.plots.budgets import draw
from circuitflow.plots.style import Style, drawing
from circuitflow.store.tables import read_provenance, read_table, write_table

N = 6
FULL, EMPTY = np.linspace(-4, -6, N), np.linspace(0.5, -0.5, N)
CURVES = {
    "run": {1: 0.2, 2: 0.6, 4: 1.0},
    "worse": {1: 0.1, 2: 0.3, 8: 1.0},
    "other": {1: 0.2, 2: 0.6, 4: 1.0},
}

METRIC = {"kind": "logit_difference", "wrong_answers": "logsumexp"}
HOW = {"metric": METRIC, "ablation": "mean", "means": "train"}
PAIRS = {"run": 60, "worse": 48}


def kept(share):
    """m of a circuit that keeps this share of the preference of every prompt."""
    return EMPTY + share * (FULL - EMPTY)


@pytest.fixture
def compare(tmp_path):
    def write(name, curve):
        count = np.array(list(curve))
        pair = np.arange(N) + (100 if name == "other" else 0)
        columns = {
            "contender": np.full(N * len(count), "as written", object),
            "method": np.full(N * len(count), "atp", object),
            "source": np.full(N * len(count), "count", object),
            "nodes": np.repeat(count, N),
            "share": np.repeat(count / count.max(), N),
            "errors": np.repeat(count // 2, N),
            "candidates": np.full(N * len(count), count.max()),
            "pair": np.tile(pair, len(count)),
            "case": np.full(N * len(count), "simple", object),
            "m": np.concatenate([kept(F) for F in curve.values()]),
            "m_empty": np.tile(EMPTY, len(count)),
            "m_full": np.tile(FULL, len(count)),
        }
        write_table(tmp_path / f"{name}.parquet", columns, {"params": compute.how.get(name, HOW)})
        nodes = (Node("resid.0", "feature", 1, 1.0), Node("resid.0", "feature", 2 + len(name), 0.5))
        selection = {} if name == "other" else {"pairs": PAIRS[name]}
        write_circuit(tmp_path / f"{name}.json", Circuit(("resid.0",), nodes, (), selection))

    def compute(names=tuple(CURVES), **params):
        for name, curve in CURVES.items():
            write(name, curve)
        tables = ("comparison", "differences", "areas", "circuits")
        files = {name: tmp_path / f"out.{name}.parquet" for name in tables}
        common = {"names": list(names), "sites": ["resid.0"], "aggregate": "ratio_of_means", "bootstrap": 200}
        common |= {"seed": 0, "least_cosine": 0.7}
        inputs = {
            "values": [tmp_path / f"{name}.parquet" for name in names],
            "circuits": [tmp_path / f"{name}.json" for name in names],
            "dictionaries": [],
        }
        compare_budgets(inputs, {**common, **params}, Output(tmp_path, files, {}))
        return {name: read_table(path) for name, path in files.items()}, read_provenance(files["areas"])

    compute.root, compute.how = tmp_path, {}
    return compute


def test_differences_at_equal_budgets_are_paired(compare):
    tables, _ = compare()
    found = tables["differences"]
    worse = found["contender"] == "worse"
    assert found["nodes"][worse].tolist() == [1, 2]
    assert found["difference"][worse] == pytest.approx([-0.1, -0.3])
    assert found["paired"][worse].all()
    # every prompt keeps the same share, so that paired differences do not vary at all
    assert np.ptp([found["low"][worse], found["high"][worse]], axis=0) == pytest.approx([0, 0], abs=1e-9)


def test_other_prompts_are_not_paired(compare):
    found = compare()[0]["differences"]
    other = found["contender"] == "other"
    assert found["nodes"][other].tolist() == [1, 2, 4]
    assert found["difference"][other] == pytest.approx([0, 0, 0])
    assert not found["paired"][other].any()


def test_another_metric_is_refused(compare):
    compare.how["worse"] = {**HOW, "metric": {**METRIC, "kind": "kl"}}
    with pytest.raises(
        UserError, match=r"worse was evaluated with task\.metric\.kind kl, the run with logit_diff"
    ):
        compare()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ablation": "zero"}, "worse: ablation zero"),
        ({"means": "test"}, "worse: ablation mean over the test pairs"),
    ],
)
def test_another_ablation_or_split_of_means_is_not_paired_and_said(compare, change, said):
    compare.how["worse"] = {**HOW, **change}
    tables, provenance = compare()
    for name in ("differences", "areas"):
        worse = tables[name]["contender"] == "worse"
        assert not tables[name]["paired"][worse].any()
    with drawing(Style(dpi=60)):
        figure = draw(tables, provenance["conventions"], Style(dpi=60))
    assert said in figure.get_supxlabel().replace("\n", " ")


def test_means_follow_the_split_that_is_configured():
    inputs = {
        f"{name}_{split}": f"{name} of {split}"
        for name in ("tokens", "gradients")
        for split in ("train", "test")
    }
    found, more = means_over(inputs, {"ablation": "mean", "means": "test"})
    assert found["gradients_train"] == "gradients of test"
    assert found["tokens_train"] == "tokens of test"
    assert more == {"means": "test"}, "results are kept apart from those of the other split"
    for params in ({"ablation": "mean", "means": "train"}, {"ablation": "resample", "means": "test"}):
        assert means_over(inputs, params) == (inputs, {})
    rule = (Path(__file__).parents[2] / "rules/comparison.smk").read_text(encoding="utf-8")
    assert "means=CFG.evaluation.means" in rule.partition("rule evaluate_budget")[2].partition("\nrule ")[0]


def test_faithfulness_and_areas_by_hand(compare):
    tables, _ = compare()
    run = tables["comparison"]["contender"] == "run"
    assert tables["comparison"]["F"][run] == pytest.approx([0.2, 0.6, 1.0])
    areas = tables["areas"]
    assert areas["contender"].tolist() == list(CURVES)
    cpr = 0.25 * (0.2 + 0.6) / 2 + 0.5 * (0.6 + 1) / 2
    cmd = 0.25 * (0.8 + 0.4) / 2 + 0.5 * (0.4 + 0) / 2
    assert areas["cpr"][0] == pytest.approx(cpr)
    assert areas["cmd"][0] == pytest.approx(cmd)
    assert areas["cpr_difference"][0] == 0
    assert areas["cpr_difference"][1] == pytest.approx(areas["cpr"][1] - cpr)


def test_circuits_overlap(compare):
    circuits = compare()[0]["circuits"]
    whole = circuits["site"] == "all"
    assert whole.sum() == 3
    first = whole & (circuits["a"] == "run") & (circuits["b"] == "worse")
    assert circuits["jaccard"][first][0] == pytest.approx(1 / 3)
    both = whole & (circuits["a"] == "worse") & (circuits["b"] == "other")
    assert circuits["jaccard"][both][0] == 1


def test_circuits_tell_how_many_pairs_are_behind_their_scores(compare):
    circuits = compare()[0]["circuits"]
    told = {
        (a, b): counts
        for a, b, *counts in zip(*(circuits[key] for key in ("a", "b", "n_a", "n_b", "n")), strict=True)
    }
    assert told == {
        ("run", "worse"): [60, 48, 48],
        ("run", "other"): [60, 0, 0],
        ("worse", "other"): [48, 0, 0],
    }
    assert len(circuits["n"]) == 6


def test_the_pairs_behind_scores_are_those_of_the_train_split(tmp_path):
    layers = {"site": ["a", "a", "b", "b"], "split": ["train", "test"] * 2, "n": [40, 90, 40, 90]}
    write_table(tmp_path / "layers.parquet", layers)
    assert scored_pairs(tmp_path / "layers.parquet") == 40


def test_names_are_those_asked_for_and_different(compare):
    compare()
    assert read_contender("mine", compare.root / "run.parquet").name == "mine"
    with pytest.raises(UserError, match="different names"):
        compare(names=("run", "run"))
    with pytest.raises(ValueError, match="does not differ"):
        ComparisonSection(contenders=[{"name": "same"}])
    with pytest.raises(ValueError, match="different names"):
        ComparisonSection(others={"ig": "somewhere"})
    assert ComparisonSection().sets() == {"neurons": {"kind": "identity"}}


def test_the_figure_names_all(compare):
    tables, provenance = compare()
    with drawing(Style(dpi=60)):
        figure = draw(tables, provenance["conventions"], Style(dpi=60), "mean")
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == list(CURVES)
    assert figure.axes[1].get_title("left") == "Against run, at equal budgets"
    assert any(text.get_text() == "1.00" for text in figure.axes[4].texts)

"""Agreement of node methods, against hand-made tables and a trained toy."""

import numpy as np
import pytest

from circuitflow.attribution.methods import compare_methods
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_provenance, read_table, write_table

FEATURES = np.array([0, 2, 5, -1])
EXACT = np.array([4.0, -3.0, 2.0, 1.0])
SCORES = {
    "exact": EXACT,
    "half": EXACT / 2,
    "turned": np.array([3.0, 4.0, -2.0, 1.0]),
    "decoder_only": np.array([8.0, 6.0, 4.0]),
}


@pytest.fixture
def compare(tmp_path):
    """Writes the tables of four methods at one site and compares them; 12 pairs with a little noise."""
    generator = np.random.default_rng(0)
    noise = 0.1 * generator.normal(size=(12, 4))
    noise -= noise.mean(0)

    def write(method, scores):
        features = FEATURES[: len(scores)]
        common = {"feature": features, "position": np.full(len(features), -1)}
        table = {
            "split": ["train"] * len(features),
            **common,
            "score": scores,
            "n": np.full(len(features), 12),
        }
        if method != "exact":  # a node that the reference has not measured
            table = {name: [*values, values[0]] for name, values in table.items()}
            table["feature"][-1] = 9
        write_table(tmp_path / f"{method}.parquet", table)
        pairs = [] if method == "decoder_only" else range(12)
        rows = [
            (pair, f, -1, s + noise[pair, i])
            for pair in pairs
            for i, (f, s) in enumerate(zip(features, scores, strict=True))
        ]
        names, kinds = ("pair", "feature", "position", "score"), ("i8", "i8", "i8", "f8")
        columns = {name: np.array([row[i] for row in rows], kinds[i]) for i, name in enumerate(names)}
        write_table(
            tmp_path / f"{method}.pairs.parquet",
            {"split": np.array(["train"] * len(rows), object), **columns},
        )

    def compute(methods=tuple(SCORES), **params):
        for method, scores in SCORES.items():
            write(method, scores)
        inputs = {f"scores_{method}": [tmp_path / f"{method}.parquet"] for method in methods}
        inputs |= {f"pairs_{method}": [tmp_path / f"{method}.pairs.parquet"] for method in methods}
        files = {name: tmp_path / f"{name}.out.parquet" for name in ("agreement", "nodes")}
        common = {
            "sites": ["mlp.0"],
            "methods": list(methods),
            "overlap_at": [1, 2, 50],
            "seed": 0,
            "bootstrap": 200,
        }
        compare_methods(inputs, {**common, **params}, Output(tmp_path, files, {}))
        return *(read_table(path) for path in files.values()), read_provenance(files["agreement"])

    return compute


def of(table, method):
    return {name: column[table["method"] == method] for name, column in table.items()}


def test_known_values(compare):
    agreement, _, provenance = compare()
    half, turned = of(agreement, "half"), of(agreement, "turned")
    assert half["pearson"] == pytest.approx(1)
    assert half["slope"] == pytest.approx(2)
    assert half["spearman"] == pytest.approx(1)
    assert half["k"].tolist() == [1, 2, 4]
    assert half["overlap"].tolist() == [1, 1, 1]
    assert turned["slope"] == pytest.approx((12 - 12 - 4 + 1) / 30)
    assert turned["pearson"] == pytest.approx(np.corrcoef(SCORES["turned"], EXACT)[0, 1])
    assert turned["spearman"] == pytest.approx(0.8)
    assert turned["overlap"].tolist() == [0, 1, 1]
    assert set(agreement["reference"]) == {"exact"}
    assert set(agreement["n"][agreement["method"] != "decoder_only"]) == {4}
    assert "through the origin" in provenance["conventions"]["slope"]


def test_intervals_hold_their_estimates(compare):
    agreement, _, _ = compare()
    turned = of(agreement, "turned")
    for name in ("pearson", "slope", "spearman", "overlap"):
        assert (turned[f"{name}_low"] <= turned[name]).all()
        assert (turned[name] <= turned[f"{name}_high"]).all()
    assert turned["slope_low"][0] < turned["slope"][0] < turned["slope_high"][0]


def test_scores_without_a_sign_are_compared_with_sizes(compare):
    agreement, nodes, _ = compare()
    bare = of(agreement, "decoder_only")
    assert bare["pearson"] == pytest.approx(1)
    assert bare["slope"] == pytest.approx(0.5)
    assert set(bare["n"]) == {3}
    assert np.isnan(bare["pearson_low"]).all()
    assert of(nodes, "decoder_only")["reference"].tolist() == [4, 3, 2]


def test_the_joined_scores_for_a_scatter(compare):
    _, nodes, _ = compare()
    half = of(nodes, "half")
    assert half["feature"].tolist() == [-1, 0, 2, 5]
    assert half["kind"].tolist() == ["error", "feature", "feature", "feature"]
    assert np.allclose(half["score"] * 2, half["reference"])


def test_the_reference_is_exact_patching_or_the_first_method_or_what_one_says(compare):
    assert set(compare(methods=("half", "turned"))[0]["reference"]) == {"half"}
    assert set(compare(reference="turned")[0]["reference"]) == {"turned"}
    with pytest.raises(UserError, match="'exakt' is not among the methods"):
        compare(reference="exakt")


def test_signed_ranking_orders_by_the_score_itself(compare):
    turned = of(compare(ranking="signed")[0], "turned")
    assert turned["overlap"].tolist() == [0, 0.5, 1]

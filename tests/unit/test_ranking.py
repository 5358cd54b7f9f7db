"""Ranking, train/test agreement and site importance, against hand-made tables."""

import numpy as np
import pytest

from circuitflow.attribution.intervals import interval, rank_correlation
from circuitflow.attribution.nodes import kinds, strength, top_nodes
from circuitflow.attribution.ranking import rank_features
from circuitflow.jobs import Output
from circuitflow.store.tables import read_table, write_table

SPLITS = ("train", "test")
PAIRS = {"train": 8, "test": 6}


def site_effects(seed: int, noise: float) -> dict[str, np.ndarray]:
    """Effects (pairs, nodes) of features 0, 2, 4, 6, 8 and the error, alike in both splits up to noise."""
    generator = np.random.default_rng(seed)
    mean = np.array([-5.0, 4, 3, 2, 1, -0.5])
    return {split: mean + noise * generator.normal(size=(n, 6)) for split, n in PAIRS.items()}


NODES = np.array([0, 2, 4, 6, 8, -1])


@pytest.fixture
def rank(tmp_path):
    """Writes the tables of score_nodes for two sites and ranks them."""
    effects = {"resid.0": site_effects(0, 0.01), "resid.1": site_effects(1, 6.0)}

    def write(site: str, per_pair: dict[str, np.ndarray], missing: int | None) -> None:
        scores, pairs = [], []
        for split, values in per_pair.items():
            for column, node in enumerate(NODES):
                if node == missing and split == "test":
                    continue
                one = values[:, column]
                scores.append(
                    (
                        split,
                        node,
                        -1,
                        one.mean(),
                        one.std(ddof=1) / len(one) ** 0.5,
                        np.abs(one).mean(),
                        1.0,
                        len(one),
                    )
                )
                pairs += [(split, 100 + pair, node, -1, value) for pair, value in enumerate(one)]
        names = ("split", "feature", "position", "score", "se", "absolute", "activity", "n")
        write_table(
            tmp_path / f"{site}.parquet", {name: [row[i] for row in scores] for i, name in enumerate(names)}
        )
        names = ("split", "pair", "feature", "position", "score")
        write_table(
            tmp_path / f"{site}.pairs.parquet",
            {name: [row[i] for row in pairs] for i, name in enumerate(names)},
        )

    def compute(missing: int | None = None, **changed):
        for site, per_pair in effects.items():
            write(site, per_pair, missing)
        inputs = {
            "scores": [tmp_path / f"{site}.parquet" for site in effects],
            "pairs": [tmp_path / f"{site}.pairs.parquet" for site in effects],
        }
        files = {name: tmp_path / f"{name}.out.parquet" for name in ("nodes", "agreement", "layers")}
        params = {"sites": list(effects), "overlap_at": [2, 4, 100], "seed": 0, "bootstrap": 300, **changed}
        rank_features(inputs, params, Output(tmp_path, files, {}))
        return {name: read_table(path) for name, path in files.items()}

    compute.effects = effects
    return compute


def at(table, **conditions) -> dict[str, np.ndarray]:
    keep = np.all([table[name] == value for name, value in conditions.items()], axis=0)
    return {name: column[keep] for name, column in table.items()}


def test_nodes_are_ranked_by_size_within_a_site(rank):
    nodes = at(rank()["nodes"], site="resid.0")
    assert nodes["feature"].tolist() == [0, 2, 4, 6, 8, -1]
    assert nodes["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    assert nodes["rank_test"].tolist() == [1, 2, 3, 4, 5, 6]
    assert nodes["kind"][-1] == "error"
    assert nodes["score_train"][0] == pytest.approx(-5, abs=0.05)
    assert set(nodes) == {
        "site", "kind", "feature", "position", "rank", "rank_test", "score_train", "score_test", "se_train", "se_test",
        "absolute_train", "absolute_test", "activity_train", "activity_test",
    }  # fmt: skip


def test_a_node_of_one_split_scores_0_in_the_other(rank):
    nodes = at(rank(missing=2)["nodes"], site="resid.0", feature=2)
    assert nodes["score_test"].tolist() == [0.0]
    assert nodes["rank_test"].tolist() == [6]


def test_agreement_is_whole_where_the_splits_agree_and_less_where_they_do_not(rank):
    agreement = rank()["agreement"]
    alike, noisy = (at(agreement, site=site) for site in ("resid.0", "resid.1"))
    assert alike["k"].tolist() == [2, 4, 6]
    for name in ("overlap", "low", "high", "spearman", "spearman_low"):
        assert np.allclose(alike[name], 1)
    assert noisy["spearman"][0] < 1
    assert (noisy["low"] <= noisy["high"]).all()
    assert noisy["low"][0] < noisy["high"][0]
    assert noisy["overlap"][-1] == 1  # all six nodes


def test_overlap_is_the_share_of_the_top_k_in_common(rank):
    effects, noisy = rank.effects["resid.1"], at(rank()["agreement"], site="resid.1")
    order = [np.argsort(-np.abs(effects[split].mean(0))) for split in SPLITS]
    for k, overlap in zip(noisy["k"], noisy["overlap"], strict=True):
        assert overlap == len(set(order[0][:k]) & set(order[1][:k])) / k


def test_importance_sums_features_and_error_apart(rank):
    layers = rank()["layers"]
    for site, effects in rank.effects.items():
        for split in SPLITS:
            row, score = at(layers, site=site, split=split), effects[split].mean(0)
            assert row["features"][0] == pytest.approx(score[:5].sum())
            assert row["features_abs"][0] == pytest.approx(np.abs(score[:5]).sum())
            assert row["error"][0] == pytest.approx(score[5])
            assert row["error_abs"][0] == pytest.approx(abs(score[5]))
            assert row["features_low"][0] < row["features"][0] < row["features_high"][0]
            assert row["n"][0] == PAIRS[split]


def test_intervals_are_those_of_resampled_pairs(rank):
    row = at(rank(bootstrap=4000)["layers"], site="resid.1", split="train")
    one = rank.effects["resid.1"]["train"][:, :5].sum(1)
    half = (row["features_high"][0] - row["features_low"][0]) / 2
    assert half == pytest.approx(1.96 * one.std() / len(one) ** 0.5, rel=0.1)


def test_the_same_seed_gives_the_same_tables(rank):
    first, second, other = rank(), rank(), rank(seed=1)
    assert all(np.array_equal(first["layers"][name], second["layers"][name]) for name in first["layers"])
    assert not np.array_equal(first["layers"]["features_low"], other["layers"]["features_low"])


def test_scores_without_pairs_have_no_intervals(rank, tmp_path, monkeypatch):
    effects = {
        "split": np.zeros(0, "U1"),
        "pair": np.zeros(0, int),
        "feature": np.zeros(0, int),
        "position": np.zeros(0, int),
        "score": np.zeros(0),
    }
    monkeypatch.setattr(
        "circuitflow.attribution.ranking.read_table",
        lambda path: effects if "pairs" in path.name else read_table(path),
    )
    tables = rank()
    assert np.isnan(tables["agreement"]["low"]).all()
    assert np.isnan(tables["layers"]["error_high"]).all()
    assert np.isfinite(tables["agreement"]["overlap"]).all()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        ([1, 1, 2, 3], [1, 2, 3, 4], 0.9486832980505138),
        ([1, 1, 1], [1, 2, 3], np.nan),
    ],
)
def test_rank_correlation(first, second, expected):
    got = rank_correlation(np.array(first), np.array([second]))
    assert got == pytest.approx(np.array([expected]), nan_ok=True)


def test_the_strongest_nodes_of_a_table():
    feature, position = np.array([5, 3, 8, -1, 1, 5, 2]), np.array([0, 0, 1, 0, 0, 1, 0])
    table = {
        "split": np.array(["train"] * 6 + ["test"], object),
        "kind": kinds(feature),
        "feature": feature,
        "position": position,
        "score": np.array([1.0, -2.0, 2.0, 9.0, 0.1, -4, 7.0]),
    }
    assert [*zip(*top_nodes(table, 3), strict=True)] == [(5, 1), (3, 0), (8, 1), (-1, 0)]
    assert [*zip(*top_nodes(table, 2, "signed"), strict=True)] == [(8, 1), (5, 0), (-1, 0)]
    assert kinds(np.array([4, -1, -2, -3])).tolist() == ["feature", "error", "rest", "metric"]


def test_signed_ranking_puts_the_most_positive_first(rank):
    nodes = at(rank(ranking="signed")["nodes"], site="resid.0")
    assert nodes["feature"].tolist() == [2, 4, 6, 8, -1, 0]
    assert strength(np.array([-2.0, 1.0]), "absolute").tolist() == [2, 1]
    assert strength(np.array([-2.0, 1.0]), "signed").tolist() == [-2, 1]
    with pytest.raises(ValueError, match="expected one of absolute, signed"):
        strength(np.zeros(1), "both")


def test_every_interval_holds_its_estimate(rank):
    """Also where all resamples lie to one side of it, as those of rank correlations and absolute sums tend to."""
    tables = rank()
    for row in ("features", "error", "features_abs", "error_abs"):
        layers = tables["layers"]
        assert (layers[f"{row}_low"] <= layers[row]).all()
        assert (layers[row] <= layers[f"{row}_high"]).all()
    agreement = tables["agreement"]
    for name, low, high in (("overlap", "low", "high"), ("spearman", "spearman_low", "spearman_high")):
        assert (agreement[low] <= agreement[name]).all()
        assert (agreement[name] <= agreement[high]).all()
    noisy = at(agreement, site="resid.1")
    assert noisy["spearman_low"][0] < noisy["spearman"][0] <= noisy["spearman_high"][0] <= 1


def test_an_interval_is_moved_onto_its_estimate():
    draws = np.arange(1001) / 1000
    assert interval(draws, 0.5) == pytest.approx((0.025, 0.975))
    assert interval(draws, 2.0) == pytest.approx((1.525, 2.475))
    assert interval(draws, 0.9, (0, 1)) == pytest.approx((0.425, 1))
    assert np.isnan(interval(np.array([1, np.nan]), 1.0)).all()


def test_nodes_at_positions_are_nodes_of_their_own(tmp_path):
    feature, position = np.array([3, 3, 1, -1, -1]), np.array([0, 2, 2, 0, 2])
    score = np.array([1.0, -4.0, 2.0, 0.5, 3.0])
    rows = {"kind": kinds(feature), "feature": feature, "position": position, "score": score}
    columns = {name: np.concatenate([values, values]) for name, values in rows.items()}
    split = np.repeat(SPLITS, 5)
    flat = {
        "se": np.ones(10),
        "absolute": np.abs(columns["score"]),
        "activity": np.ones(10),
        "n": np.full(10, 1),
    }
    write_table(tmp_path / "s.parquet", {"split": split, **columns, **flat})
    write_table(tmp_path / "p.parquet", {"split": split, "pair": np.zeros(10, int), **columns})
    files = {name: tmp_path / f"{name}.out.parquet" for name in ("nodes", "agreement", "layers")}
    params = {"sites": ["mlp.0"], "overlap_at": [2], "seed": 0, "bootstrap": 10}
    inputs = {"scores": [tmp_path / "s.parquet"], "pairs": [tmp_path / "p.parquet"]}
    rank_features(inputs, params, Output(tmp_path, files, {}))
    nodes = read_table(files["nodes"])
    assert list(zip(nodes["feature"], nodes["position"], strict=True)) == [
        (3, 2),
        (-1, 2),
        (1, 2),
        (3, 0),
        (-1, 0),
    ]
    assert read_table(files["agreement"])["nodes"].tolist() == [5]

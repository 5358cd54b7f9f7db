"""The comparison of a study's dictionaries, and the agreement between seeds on rows whose partners are known."""

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.measuring import quality_lines, splice_lines, weight_lines
from circuitflow.dictionaries.quality import Quality
from circuitflow.dictionaries.splicing import COUNTS, Splice
from circuitflow.features import seeds
from circuitflow.features.comparison import WITH_INTERVALS, WITHOUT, compare_variants
from circuitflow.features.seeds import agreement, matching
from circuitflow.jobs import Output
from circuitflow.store.tables import read_table, write_table
from tests.fixtures.planted_study import write_dictionary

SITE = "resid.1"
D_MODEL = 16
LABELS = ["topk-k4-seed0", "relu-p0.1-seed0", "topk-k4-seed1", "topk-k8-seed0"]
SETTINGS = [
    {"kind": "topk", "k": 4, "seed": 0, "training": {"epochs": 1}},
    {"kind": "relu", "penalty": 0.1, "seed": 0, "training": {"epochs": 1}},
    {"kind": "topk", "k": 4, "seed": 1, "training": {"epochs": 1}},
    {"kind": "topk", "k": 8, "seed": 0, "training": {"epochs": 1}},
]


def directions(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed))


def test_renumbered_and_scaled_rows_agree_fully():
    rows = directions(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = agreement(rows, torch.linspace(0.5, 2, 12)[:, None] * rows[order], seed=0)
    ones = (
        "mean_max_cosine_ab",
        "mean_max_cosine_ba",
        "partner_share_ab",
        "partner_share_ba",
        "matched_mean",
    )
    for name in (*ones, "matched_share", "cosine_p05", "cosine_p95"):
        assert found[name] == pytest.approx(1, abs=1e-6), name
    assert found["matching"] == "hungarian"
    assert 0 < found["chance"] < 0.8


def test_unrelated_rows_agree_as_much_as_chance():
    found = agreement(directions(300), directions(300, seed=1), seed=0)
    assert found["mean_max_cosine_ab"] == pytest.approx(found["chance"], abs=0.02)
    assert found["partner_share_ab"] < 0.01


def test_a_row_is_partner_of_one_row_alone():
    """By hand: both rows of a are nearest to the first of b; one of them must take the second."""
    a = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    b = torch.tensor([[1.0, 0.1], [-1.0, 0.0]]) / torch.tensor([[1.01**0.5], [1.0]])
    found = agreement(a, b, seed=0)
    near, other = 1 / 1.01**0.5, 0.86 / 1.01**0.5
    assert found["mean_max_cosine_ab"] == pytest.approx((near + other) / 2)
    assert found["mean_max_cosine_ba"] == pytest.approx((near + 0 * other - 0.8) / 2)
    assert found["matched_mean"] == pytest.approx((near - 0.8) / 2)  # the other choice gives (other − 1) / 2
    assert found["matched_share"] == found["partner_share_ab"] == 0.5
    assert found["cosine_p50"] == pytest.approx((near + other) / 2)


def test_the_matching_is_the_best_of_all(monkeypatch):
    a, b = directions(5), directions(6, seed=1)
    cosine = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2).numpy()
    best = max(cosine[np.arange(5), list(order)].sum() for order in permutations(range(6), 5))
    assert matching(a, b).cosine.sum() == pytest.approx(best, rel=1e-6)
    monkeypatch.setattr(seeds, "LARGEST_EXACT", 0)
    greedy = matching(a, b)
    assert greedy.method == "greedy"
    left = cosine.copy()
    for value in greedy.cosine:  # the largest cosine of what is left, again and again
        assert value == pytest.approx(left.max(), rel=1e-6)
        row, column = np.unravel_index(left.argmax(), left.shape)
        left[row], left[:, column] = -2, -2
    assert len(greedy.cosine) == 5
    assert greedy.cosine.sum() <= best + 1e-6


def test_greedy_and_exact_matching_agree_where_partners_are_clear(monkeypatch):
    a = directions(40)
    b = a.flip(0) + 0.1 * directions(40, seed=1)
    exact = matching(a, b)
    monkeypatch.setattr(seeds, "LARGEST_EXACT", 0)
    monkeypatch.setattr(seeds, "ENTRIES", 100)
    np.testing.assert_allclose(np.sort(matching(a, b).cosine), np.sort(exact.cosine), rtol=1e-6)


def test_nothing_agrees_with_nothing():
    found = agreement(directions(3), torch.empty(0, D_MODEL), seed=0)
    assert all(np.isnan(value) for name, value in found.items() if name != "matching")
    with_zero = agreement(torch.cat([directions(3), torch.zeros(1, D_MODEL)]), directions(3), seed=0)
    assert with_zero["mean_max_cosine_ab"] == pytest.approx(1)


def dictionary_of(settings: dict[str, Any], rows: torch.Tensor) -> Dictionary:
    at = (SITE,)
    zeros, wide = torch.zeros(len(rows)), torch.zeros(D_MODEL)
    notes = {"step": 7, "tokens": 70}
    return Dictionary(
        settings["kind"], at, at, "topk", rows, zeros, rows, wide, settings={"k": 4}, notes=notes
    )


def write_quality(path: Path, number: int) -> Path:
    """A table of which every value tells its place; a second line with outliers comes first."""
    names = [*WITH_INTERVALS, *WITHOUT]
    lines = [
        ("fvu", "all", -1.0),
        *((name, "kept", 10.0 * number + place) for place, name in enumerate(names)),
    ]
    value = np.array([line[2] for line in lines])
    known = np.array([line[0] in WITH_INTERVALS for line in lines])
    columns = {
        "quantity": [line[0] for line in lines],
        "tokens": [line[1] for line in lines],
        "value": value,
        "n": np.full(len(lines), 1000 + number),
        "ci_low": np.where(known, value - 0.25, np.nan),
        "ci_high": np.where(known, value + 0.25, np.nan),
    }
    write_table(path, columns)
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, list[Path]]:
    """Four dictionaries of 10 features; the one of seed 1 has those of seed 0 in another order, two of them unlike."""
    rows = directions(10)
    changed = torch.cat([rows[2:], directions(2, seed=9)])
    found: dict[str, list[Path]] = {"dictionaries": [], "quality": [], "features": []}
    for number, (label, settings) in enumerate(zip(LABELS, SETTINGS, strict=True)):
        dictionary = dictionary_of(settings, changed if settings["seed"] else rows)
        density = np.r_[np.full(9, 0.1), 0.0]  # the last feature is never active
        features = tmp_path / f"{label}.features.parquet"
        stability = None if number == 1 else 0.5 + number / 10
        write_table(features, {"density": density}, {"facts": {"stability": stability}})
        found["dictionaries"].append(write_dictionary(tmp_path, label, dictionary))
        found["quality"].append(write_quality(tmp_path / f"{label}.quality.parquet", number))
        found["features"].append(features)
    return found


def compared(inputs: dict[str, list[Path]], folder: Path, **params: Any) -> dict[str, Path]:
    files = {"variants": folder / "variants.parquet", "seeds": folder / "seeds.parquet"}
    files["summary"] = folder / "summary.txt"
    compute = {"threads": 1, "device": "cpu"}
    params = {"site": SITE, "labels": LABELS, "settings": SETTINGS, "seed": 0, "compute": compute, **params}
    compare_variants(inputs, params, Output(folder, files, {"params": params}))
    return files


def test_every_variant_has_a_row_of_its_own_numbers(inputs, tmp_path):
    table = read_table(compared(inputs, tmp_path / "out")["variants"])
    assert table["label"].tolist() == LABELS
    assert table["group"].tolist() == ["topk-k4", "relu-p0.1", "topk-k4", "topk-k8"]
    assert table["kind"].tolist() == ["topk", "relu", "topk", "topk"]
    assert table["seed"].tolist() == [0, 0, 1, 0]
    np.testing.assert_array_equal(table["k"], [4, np.nan, 4, 8])
    np.testing.assert_array_equal(table["penalty"], [np.nan, 0.1, np.nan, np.nan])
    assert np.isnan(table["target_l0"]).all()
    assert table["d_dict"].tolist() == 4 * [10]
    assert table["n"].tolist() == [1000, 1001, 1002, 1003]
    for place, name in enumerate([*WITH_INTERVALS, *WITHOUT]):
        assert table[name].tolist() == [10 * number + place for number in range(4)]
    for name in WITH_INTERVALS:
        np.testing.assert_array_equal(table[f"{name}_low"], table[name] - 0.25)
        np.testing.assert_array_equal(table[f"{name}_high"], table[name] + 0.25)
    np.testing.assert_array_equal(table["stability"], [0.5, np.nan, 0.7, 0.8])
    assert table["steps"].tolist() == 4 * [7]
    assert table["tokens"].tolist() == 4 * [70]


def test_the_quality_table_has_what_is_read_from_it():
    rows = directions(6)
    quality = Quality(dictionary_of({"kind": "topk"}, rows), 1)
    zeros = torch.zeros(8, dtype=torch.int64)
    quality.add(directions(8, seed=2), zeros, zeros)
    splice = Splice([dict.fromkeys(COUNTS, 1.0)])
    lines = [*quality_lines(quality, 2), *weight_lines(quality.dictionary, 0.0), *splice_lines(splice, 2)]
    assert {*WITH_INTERVALS, *WITHOUT} <= {line.quantity for line in lines}


def test_only_active_features_of_other_seeds_are_compared(inputs, tmp_path):
    table = read_table(compared(inputs, tmp_path / "out")["seeds"])
    assert [table[name].tolist() for name in ("label_a", "label_b")] == [LABELS[:1], LABELS[2:3]]
    assert [table[name].tolist() for name in ("group", "seed_a", "seed_b")] == [["topk-k4"], [0], [1]]
    assert [table[name].tolist() for name in ("alive_a", "alive_b")] == [[9], [9]]
    # a has rows 0 … 8, b rows 2 … 9 and one unlike them: 2 … 8 are in both
    assert table["partner_share_ab"].tolist() == table["partner_share_ba"].tolist() == [7 / 9]
    assert table["matched_share"].tolist() == [7 / 9]


def test_variants_that_differ_in_more_than_the_seed_are_no_pair(inputs, tmp_path):
    other = [SETTINGS[0], SETTINGS[1], {**SETTINGS[2], "training": {"epochs": 2}}, SETTINGS[3]]
    files = compared(inputs, tmp_path / "out", settings=other)
    table = read_table(files["seeds"])
    assert len(table["label_a"]) == 0
    assert {"label_a", "matched_mean", "cosine_p95", "matching"} <= set(table)
    assert "Agreement" not in files["summary"].read_text()


def test_one_dictionary_under_two_labels_is_no_pair(inputs, tmp_path):
    same = [SETTINGS[0], SETTINGS[1], SETTINGS[0], SETTINGS[3]]
    assert len(read_table(compared(inputs, tmp_path / "out", settings=same)["seeds"])["label_a"]) == 0


def test_the_summary_is_plain_text_whatever_the_terminal(inputs, tmp_path, monkeypatch):
    text = compared(inputs, tmp_path / "a")["summary"].read_text()
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert compared(inputs, tmp_path / "b")["summary"].read_text() == text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) < 150
    assert all(line == line.rstrip() for line in lines)
    (relu,) = (line for line in lines if line.startswith("relu-p0.1-seed0"))
    assert "10.000 (9.750–10.250)" in relu  # FVU of variant 1
    assert "14.000 (13.750–14.250)" in relu  # CE recovered
    assert relu.split()[1:3] == ["10", "11.0"]  # features, L0
    assert any(line.startswith("topk-k4 ") and "0, 1" in line and "77.8 %" in line for line in lines)


def test_equal_comparisons_give_equal_bytes(inputs, tmp_path):
    first, second = (compared(inputs, tmp_path / name) for name in ("a", "b"))
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes()

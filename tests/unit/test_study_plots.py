"""Figures of a study: they show the numbers of its tables, at any number of variants, the same bytes every time."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from circuitflow.plots import study_firing, study_frontier, study_seeds, study_training, study_weights
from circuitflow.plots.layout import settle
from circuitflow.plots.style import drawing
from circuitflow.store.tables import read_table
from tests.fixtures import synthetic_study
from tests.fixtures.study_figures import (
    FIGURES,
    STUDY_FIGURES,
    STYLE,
    VARIANT_FIGURES,
    axes_with,
    check_texts,
    drawn,
    figure_of,
    marks_at,
    note,
    plot,
    rows_of,
    small_features,
    texts,
)
from tests.fixtures.synthetic_study import FEW, LABELS, LONG, MANY, Study, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return write_study(tmp_path_factory.mktemp("study") / "results" / "made", LABELS[:4], d_dict=120, top=8)


@pytest.fixture(scope="module", params=[FEW[:1], LABELS[:6], MANY, LONG], ids=["one", "some", "many", "long"])
def sized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return write_study(tmp_path_factory.mktemp("sized") / "results" / "made", request.param, d_dict=60)


@pytest.mark.parametrize("name", FIGURES)
def test_equal_work_gives_equal_bytes_and_carries_its_provenance(name, study, tmp_path):
    first, second = plot(name, study, tmp_path / "a"), plot(name, study, tmp_path / "b")
    for kind in ("png", "svg"):
        assert first[kind].read_bytes() == second[kind].read_bytes()
    svg = first["svg"].read_text()
    described = re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)
    assert described is not None
    assert json.loads(described[1]) == {"stage": f"plot_{name}"}
    assert str(study.folders[0]) not in svg


def test_a_settled_figure_keeps_its_layout_in_rounded_places(study):
    figure = figure_of("variant_correlation", study)
    with drawing(STYLE):
        settle(figure, 60)
        places = [axes.get_position(original=True).bounds for axes in figure.axes]
        figure.set_size_inches(3, 9)
        figure.draw_without_rendering()
    assert [axes.get_position(original=True).bounds for axes in figure.axes] == places
    assert all(value == pytest.approx(round(value, 6), abs=1e-12) for place in places for value in place)


def test_figures_of_a_study_do_without_torch():
    imports = ", ".join(f"circuitflow.plots.{name}" for name in FIGURES)
    code = (
        f"import sys, {imports}\nassert not {{'torch', 'transformers', 'sklearn', 'umap'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", STUDY_FIGURES)
def test_texts_of_any_number_of_variants_can_be_read(name, sized):
    check_texts(figure_of(name, sized))


@pytest.mark.parametrize("name", VARIANT_FIGURES)
def test_texts_of_one_variant_can_be_read(name, tmp_path):
    check_texts(figure_of(name, write_study(tmp_path / "results" / "made", FEW[:1], d_dict=300)))


@pytest.mark.parametrize("name", FIGURES)
def test_a_dictionary_that_was_not_trained_is_drawn_too(name, tmp_path):
    study = write_study(tmp_path / "results" / "made", ("random-k32-seed0",), d_dict=60)
    said = [text for axes in figure_of(name, study).axes for text in texts(axes)]
    expected = {
        "study_training": "no variant was trained",
        "study_firing": "no variant has checkpoints",
        "study_emergence": "no variant has checkpoints",
        "study_seeds": "no two variants differ in the seed alone",
        "variant_concepts": "no checkpoints",
    }
    assert name not in expected or expected[name] in said


@pytest.mark.parametrize("name", [*VARIANT_FIGURES, "study_weights", "study_firing"])
def test_a_dictionary_of_which_nothing_is_active_is_drawn_too(name, tmp_path):
    study = write_study(tmp_path / "results" / "made", FEW[:1], d_dict=30)
    silent = read_table(study.tables("features")[0])
    for column in ("density", "max_value", "importance"):
        silent[column] = np.zeros(30)
    for column in ("map_x", "map_y", "sensitivity", "mean_active"):
        silent[column] = np.full(30, np.nan)
    synthetic_study.write_table(study.tables("features")[0], silent)
    for table in ("heatmap", "correlation"):
        kept = {key: column[:0] for key, column in read_table(study.tables(table)[0]).items()}
        synthetic_study.write_table(study.tables(table)[0], kept)
    checkpoints = read_table(study.tables("checkpoints")[0])
    for column in ("density_p25", "density_p50", "density_p75", "match_mean", "present_share"):
        checkpoints[column] = np.full(len(checkpoints["step"]), np.nan)
    synthetic_study.write_table(study.tables("checkpoints")[0], checkpoints)
    said = " ".join(text for axes in figure_of(name, study).axes for text in texts(axes))
    assert "no " in said or "fewer than two" in said


def test_training_shows_every_log_and_names_what_was_not_trained(tmp_path):
    study = write_study(tmp_path / "results" / "made", (*FEW, "random-k32-seed0"), d_dict=20)
    curves = study_training.read_curves(study.dictionaries)
    assert [len(curve["tokens"]) for curve in curves.values()] == [400, 400, 0]
    figure = drawn(study_training.draw, curves)
    fvu = axes_with(figure, "Variance unexplained")
    assert [line.get_xdata()[-1] for line in fvu.lines] == [400 * 1024] * 2
    for line, label in zip(fvu.lines, FEW, strict=True):
        assert np.array_equal(line.get_ydata(), curves[label]["fvu"])
    loss = axes_with(figure, "Training loss")
    assert all(len(line.get_xdata()) == study_training.BINS for line in loss.lines)
    assert loss.get_yscale() == "log"
    assert note(figure).endswith("Not trained here: random-k32-seed0.")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["topk-k32", "relu-p0.003"]


def test_a_thinned_curve_has_the_means_of_equal_stretches():
    x, y = study_training.thinned(np.arange(6.0), np.array([0.0, 2, 4, 6, 8, 10]), bins=3)
    assert x.tolist() == [0.5, 2.5, 4.5]
    assert y.tolist() == [1, 5, 9]
    few = np.array([1.0, 2.0])
    assert study_training.thinned(few, few, bins=3)[1].tolist() == [1, 2]


def frontier_table(labels: Sequence[str], l0: Sequence[float], fvu: Sequence[float]) -> dict[str, np.ndarray]:
    table = synthetic_study.variants(labels, np.random.default_rng(0))
    table |= {"l0": l0, "fvu": fvu, "fvu_low": np.array(fvu) - 0.01, "fvu_high": np.array(fvu) + 0.03}
    return {name: np.array(column, object if name == "label" else None) for name, column in table.items()}


def test_the_frontier_joins_means_over_seeds_and_shows_intervals():
    labels = ("topk-k64-seed0", "topk-k16-seed0", "topk-k16-seed1", "relu-p0.01-seed0")
    table = frontier_table(labels, [64, 16, 16, 30], [0.1, 0.2, 0.3, 0.4])
    figure = drawn(study_frontier.draw, table)
    axes = axes_with(figure, "Variance unexplained")
    joined = next(line for line in axes.lines if line.get_label() == "topk")
    assert joined.get_xdata().tolist() == [16, 64]
    assert joined.get_ydata().tolist() == pytest.approx([0.25, 0.1])
    marks = [container.lines[0] for container in axes.containers]
    assert [mark.get_ydata()[0] for mark in marks] == [0.1, 0.2, 0.3, 0.4]
    vertical = axes.containers[2].lines[2][1].get_segments()[0]
    assert vertical[:, 1].tolist() == pytest.approx([0.29, 0.33])
    assert texts(axes) == ["p0.01"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < 0.09
    assert axes.get_ylim()[1] > 0.43
    assert "n = 9\u202f000 tokens" in note(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["topk", "relu"]


def test_a_quantity_that_was_not_measured_is_said_to_be_missing():
    table = frontier_table(FEW, [16, 64], [0.2, 0.1])
    table["kl"] = np.array([np.nan, np.nan])
    figure = drawn(study_frontier.draw, table)
    assert texts(axes_with(figure, "Divergence")) == ["not measured"]
    assert len(axes_with(figure, "Variance unexplained").containers) == 2


def test_weights_are_those_of_active_features():
    table = small_features(density=[0.1, 0.1, 0.1, 0, 0.2], enc_dec_cosine=[0.2, 0.4, 0.6, -0.9, 0.9])
    figure = drawn(study_weights.draw, {"topk-k8-seed0": table})
    axes = axes_with(figure, "Encoder–decoder")
    assert marks_at(axes, 0) == [pytest.approx(0.5)]  # the median of 0.2, 0.4, 0.6, 0.9
    thin = next(line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == 0)
    assert thin.get_xdata().tolist() == pytest.approx(np.percentile([0.2, 0.4, 0.6, 0.9], (5, 95)))
    assert rows_of(figure.axes[0]) == ["topk-k8-seed0  n 4"]
    assert note(figure).endswith("Every decoder row has norm 1.")
    assert "Decoder norm" not in [axes.get_title(loc="left") for axes in figure.axes]


def test_decoder_norms_are_shown_where_they_differ_from_1():
    table = small_features(density=[1, 1, 1, 0, 1], decoder_norm=[1, 2, 3, 1, 6])
    figure = drawn(study_weights.draw, {"pretrained-seed0": table})
    assert marks_at(axes_with(figure, "Decoder norm"), 0) == [2.5]
    assert "norm 1" not in note(figure)


def test_steadiness_is_spearmans_correlation_of_quarters():
    quarters = {
        "density_q1": [0.1, 0.2, 0.3, 0.4, 9],
        "density_q2": [0.1, 0.2, 0.3, 0.4, 0],
        "density_q3": [0.4, 0.3, 0.2, 0.1, 0],
        "density_q4": [0.1, 0.1, 0.3, 0.4, 0],  # ranks 0.5, 0.5, 2, 3: r with 0, 1, 2, 3 is 0.9487
    }
    found = study_firing.steadiness(small_features(density=[0.1, 0.1, 0.1, 0.1, 0], **quarters))
    assert found == pytest.approx([1, -1, 0.9486833, -1, 0.9486833, -0.9486833])


def test_a_quarter_without_tokens_counts_for_nothing():
    table = small_features(density=[0.1, 0.1, 0.1, 0.1, 0.1], density_q4=[np.nan] * 5)
    assert len(study_firing.steadiness(table)) == 3


def test_firing_shows_shares_quartiles_and_the_trend():
    density = [0.001, 0.001, 0.01, 0.5, 0]
    features = {
        "topk-k8-seed0": small_features(density=density),
        "relu-seed0": small_features(density=[0] * 5),
    }
    steps = synthetic_study.checkpoints((1, 2, 3), np.random.default_rng(0))
    figure = drawn(study_firing.draw, features, {"topk-k8-seed0": steps})
    assert sorted(marks_at(axes_with(figure, "Often and never"), 0)) == [pytest.approx(0.2)] * 2
    assert sorted(marks_at(axes_with(figure, "Often and never"), 1)) == [0, 1]
    histogram = axes_with(figure, "How often features fire")
    assert np.median(np.log10(density[:4])) in [line.get_xdata()[0] for line in histogram.lines]
    assert rows_of(histogram) == ["topk-k8-seed0  n 4", "relu-seed0  n 0"]
    trend = axes_with(figure, "Density during training")
    assert np.array_equal(trend.lines[0].get_ydata(), steps["density_p50"])
    assert len(trend.collections) == 1  # the band of quartiles
    often = axes_with(figure, "Firing often, during training")
    assert np.array_equal(often.lines[0].get_ydata(), steps["high_frequency_share"])
    assert np.array_equal(often.lines[0].get_xdata(), steps["tokens"])


def test_bands_of_many_variants_are_left_out(tmp_path):
    study = write_study(tmp_path / "results" / "made", LABELS, d_dict=20)
    trend = axes_with(figure_of("study_firing", study), "Density during training")
    assert len(trend.lines) == len(LABELS)
    assert not trend.collections


def test_emergence_follows_checkpoints_and_names_who_has_none(tmp_path):
    study = write_study(tmp_path / "results" / "made", (*FEW, "identity-seed0"), d_dict=20)
    figure = figure_of("study_emergence", study)
    table = read_table(study.tables("checkpoints")[1])
    present = axes_with(figure, "Finished features present")
    assert np.array_equal(present.lines[1].get_ydata(), table["present_share"])
    assert np.array_equal(present.lines[1].get_xdata(), table["tokens"])
    assert len(present.lines) == 2
    assert note(figure).endswith("Without checkpoints: identity-seed0.")


def test_seeds_have_a_row_per_pair_with_both_ways():
    table = synthetic_study.seeds(LABELS[:4], np.random.default_rng(0))
    table |= {"partner_share_ab": np.array([0.25, 0.5]), "partner_share_ba": np.array([0.3, 0.6])}
    pairs = {name: np.array(column) for name, column in table.items()}
    figure = drawn(study_seeds.draw, pairs)
    assert rows_of(figure.axes[0]) == ["topk-k16, 0–1  n 351, 348", "topk-k32, 0–1  n 351, 348"]
    assert sorted(marks_at(axes_with(figure, "With a partner"), 1)) == [0.5, 0.6]
    assert sorted(marks_at(axes_with(figure, "One to one"), 0)) == [
        pairs["matched_share"][0],
        pairs["matched_mean"][0],
    ]
    mean = (pairs["mean_max_cosine_ab"][0] + pairs["mean_max_cosine_ba"][0]) / 2
    assert marks_at(axes_with(figure, "Largest cosine"), 0) == [pytest.approx(mean), pairs["chance"][0]]

"""Figures of one variant of a study, and how variants are called and told apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from circuitflow.plots import variant_concepts, variant_correlation, variant_heatmap, variant_map
from circuitflow.plots.scales import decade, log_axis, tokens
from circuitflow.plots.style import drawing, new_figure
from circuitflow.plots.variants import Variant, by_variant, looks, names
from circuitflow.store.tables import read_table
from tests.fixtures.study_figures import (
    STYLE,
    TITLE,
    axes_with,
    drawn,
    figure_of,
    note,
    plot,
    points,
    rows_of,
    small_features,
    texts,
)
from tests.fixtures.synthetic_study import FEW, Study, one_variant, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return write_study(tmp_path_factory.mktemp("study") / "results" / "made", FEW, d_dict=120, top=8)


def test_a_label_says_kind_group_and_seed():
    assert Variant.of("relu-p1e-05-d64-seed3") == Variant(
        "relu-p1e-05-d64-seed3", group="relu-p1e-05-d64", kind="relu", seed="3"
    )
    assert Variant.of("mine") == Variant("mine", "mine", "mine", "")
    families = ("topk-k32-d64", "topk-k8-d64", "relu-p1e-05-d64", "jumprelu-l0_16", "topk-lr0.001-k4")
    assert [Variant.of(label).family for label in families] == [
        *("topk-d64", "topk-d64", "relu-d64", "jumprelu", "topk-lr0.001"),
    ]


def test_kinds_differ_in_colour_settings_in_style_seeds_in_width():
    found = looks(["topk-k16-seed0", "topk-k32-seed0", "relu-p1-seed0", "topk-k32-seed1", "mine-seed0"])
    first, second, other, again, own = found.values()
    assert first.colour == second.colour == again.colour != other.colour
    assert own.colour not in (first.colour, other.colour)
    assert (first.line, first.mark) != (second.line, second.mark) == (again.line, again.mark)
    assert [look.first for look in found.values()] == [True, True, True, False, True]
    assert again.width < second.width


def test_looks_of_many_settings_of_one_kind_all_differ():
    found = looks(f"topk-k{k}-seed0" for k in range(24))
    assert len({(look.line, look.mark) for look in found.values()}) == 24


def test_seeds_of_a_group_stand_together():
    names = ("topk-k8-seed0", "relu-seed0", "topk-k8-seed1", "relu-seed1")
    ordered = by_variant([Path(f"studies/s/{name}/features.parquet") for name in names])
    assert list(ordered) == ["topk-k8-seed0", "topk-k8-seed1", "relu-seed0", "relu-seed1"]
    assert ordered["relu-seed1"] == Path("studies/s/relu-seed1/features.parquet")


def test_long_labels_lose_what_all_of_their_kind_share():
    long = [f"jumprelu-p{p}-d16384-resample_every500-seed0" for p in ("1e-05", "0.001")]
    called = names([*long, "topk-k8-d16384-seed0"])
    assert list(called.values()) == ["jumprelu-p1e-05-seed0", "jumprelu-p0.001-seed0", "topk-k8-d16384-seed0"]
    assert names(long[:1]) == {long[0]: long[0]}  # nothing tells what matters


def test_variants_of_one_kind_have_colours_by_setting():
    found = looks(["topk-k8-seed0", "topk-k8-seed1", "topk-k16-seed0"])
    assert len({look.colour for look in found.values()}) == 2
    assert found["topk-k8-seed0"].colour == found["topk-k8-seed1"].colour


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (decade(0.05), "0.05"),
        (decade(200), "200"),
        (decade(1e-5), "10⁻⁵"),
        (decade(2e6), "2·10⁶"),
        (decade(0), ""),
        (tokens(800_000), "800\u202fk"),
        (tokens(1.5e6), "1.5\u202fM"),
        (tokens(0), "0"),
    ],
)
def test_ticks_as_text(text, expected):
    assert text == expected


def test_a_logarithmic_axis_spans_what_is_positive():
    with drawing(STYLE):
        axes = new_figure(3, 2).subplots()
        log_axis(axes, "y", [0.01, 0, float("nan"), 2])
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert 0.001 < low < 0.01
    assert 2 < high < 20
    assert any(label.get_text() == "0.1" for label in axes.get_yticklabels())
    with drawing(STYLE):
        bare = new_figure(3, 2).subplots()
        log_axis(bare, "y", [0, -1])
    assert bare.get_yscale() == "linear"


def test_the_map_shows_every_feature_that_has_a_place():
    table = one_variant("topk-k8-seed0", 200)["features"]
    figure = drawn(variant_map.draw, table, TITLE)
    placed = np.isfinite(table["map_x"])
    clusters, density = points(figure.axes[0])[0], points(figure.axes[1])
    expected = np.stack([table["map_x"], table["map_y"]], 1)[placed]
    assert sorted(map(tuple, clusters)) == sorted(map(tuple, expected))
    assert len(density[0]) == placed.sum()
    top = np.argsort(-np.where(placed, table["importance"], -1))[: variant_map.NAMED]
    assert np.allclose(density[1], np.stack([table["map_x"], table["map_y"]], 1)[top])  # the rings
    named = [int(text) for text in texts(figure.axes[1])]
    assert named[0] == top[0]
    assert set(named) <= set(top.tolist())
    assert f"{placed.sum()} of 200" in note(figure)
    count = len(set(table["cluster"][placed]) - {-1})
    assert f"{count} clusters" in note(figure)
    assert figure.get_suptitle() == TITLE


def test_a_map_with_one_feature_is_drawn_too():
    table = small_features(
        density=[0, 0.1, 0, 0, 0], map_x=[np.nan, 1, *[np.nan] * 3], map_y=[np.nan, 2, *[np.nan] * 3]
    )
    figure = drawn(variant_map.draw, table, TITLE)
    assert points(figure.axes[0])[0].tolist() == [[1, 2]]


def test_the_heat_map_shows_shares_of_each_features_own_largest_value():
    heatmap = {
        "feature": np.array([4, 4, 1, 1]),
        "block": np.array([7, 7, 7, 7]),
        "position": np.array([3, 4, 3, 4]),
        "token": np.array([" the", "\n", " the", "\n"], object),
        "value": np.array([0.0, 3.0, 0.5, 2.0]),
    }
    table = small_features(density=[0.1] * 5, max_value=[1, 4, 1, 1, 6], importance=[0.1, 0.2, 0.1, 0.1, 0.4])
    figure = drawn(variant_heatmap.draw, heatmap, table, TITLE)
    cells = next(axes for axes in figure.axes if axes.images)
    assert np.array_equal(cells.images[0].get_array(), [[0, 0.5], [0.125, 0.5]])
    assert rows_of(cells) == ["#4", "#1"]
    assert [label.get_text() for label in cells.get_xticklabels()] == ["·the", "↵"]
    counts = next(axes for axes in figure.axes if axes.get_ylabel() == "active")
    assert [bar.get_height() for bar in counts.patches] == [1, 2]
    importance = next(axes for axes in figure.axes if axes.get_xlabel() == "importance")
    assert importance.lines[0].get_xdata().tolist() == [0.4, 0.2]
    assert importance.get_xscale() == "log"


def correlations(matrix: Sequence[Sequence[float]], numbers: Sequence[int]) -> dict[str, np.ndarray]:
    return {
        "feature_a": np.repeat(numbers, len(numbers)),
        "feature_b": np.tile(numbers, len(numbers)),
        "correlation": np.array(matrix, float).ravel(),
    }


def test_correlated_features_stand_together_and_unknown_ones_are_grey():
    nan = float("nan")
    matrix = [
        [1, 0, 0.9, 0, nan],
        [0, 1, 0, -0.8, nan],
        [0.9, 0, 1, 0.1, nan],
        [0, -0.8, 0.1, 1, nan],
        [nan, nan, nan, nan, nan],
    ]
    figure = drawn(variant_correlation.draw, correlations(matrix, [9, 5, 7, 3, 2]), TITLE)
    cells = axes_with(figure, "Correlation of activations")
    order = [int(name[1:]) for name in rows_of(cells)]
    assert abs(order.index(9) - order.index(7)) == 1
    shown = np.ma.filled(cells.images[0].get_array(), np.nan)
    assert np.isnan(np.diag(shown)).all()
    assert np.isnan(shown[order.index(2)]).all()
    assert shown[order.index(5), order.index(3)] == -0.8
    strongest = axes_with(figure, "Strongest pairs")
    assert [bar.get_width() for bar in strongest.patches][:3] == [0.9, -0.8, 0.1]
    assert rows_of(strongest)[:2] == ["#9 · #7", "#5 · #3"]
    assert "all 6 pairs" in note(figure)


def test_average_linkage_finds_planted_groups():
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1, 2], 4))
    matrix = np.where(group[:, None] == group, 0.7, 0.05) + rng.uniform(0, 0.04, (12, 12))
    order = variant_correlation.linkage_order((matrix + matrix.T) / 2)
    assert sorted(order) == list(range(12))
    assert sum(a != b for a, b in zip(group[order], group[order][1:], strict=False)) == 2


def emergence_of(matches: Mapping[int, Sequence[float]]) -> dict[str, np.ndarray]:
    """Match by feature at the steps 10, 20, …, in an order that is not the table's own."""
    rows = [(feature, 10 * (i + 1), m) for feature, line in matches.items() for i, m in enumerate(line)]
    feature, step, match = zip(*rows[::-1], strict=True)
    return {"feature": np.array(feature), "step": np.array(step), "match": np.array(match)}


def test_features_are_in_the_order_in_which_they_came_to_stay():
    given = {
        0: (0.95, 0.5, 1.0),  # there, gone, back: it came to stay at the third step
        1: (0.5, 0.95, 1.0),
        2: (0.95, 0.95, 1.0),
        3: (0.1, 0.1, 1.0),
        4: (0.99, 0.99, 1.0),  # not active: not shown
    }
    steps, table = variant_concepts.matches(emergence_of(given), small_features(density=[1, 1, 1, 1, 0]))
    assert steps.tolist() == [10, 20, 30]
    assert table.tolist() == [list(given[feature]) for feature in (2, 1, 0, 3)]


def test_concepts_show_when_features_came_and_what_they_are_worth(study):
    figure = figure_of("variant_concepts", study)
    tables = {name: read_table(study.tables(name)[0]) for name in ("features", "projection", "checkpoints")}
    alive = tables["features"]["density"] > 0
    matrix = axes_with(figure, "Which finished features exist when")
    assert matrix.images[0].get_array().shape == (alive.sum(), 4)
    assert [label.get_text() for label in matrix.get_xticklabels()] == [
        tokens(count) for count in tables["checkpoints"]["tokens"]
    ]
    cosines = axes_with(figure, "Cosines during training")
    present = next(line for line in cosines.lines if line.get_label() == "present")
    assert np.array_equal(present.get_ydata(), tables["checkpoints"]["present_share"])
    purpose = points(axes_with(figure, "Importance and sensitivity"))[0]
    assert len(purpose) == alive.sum()
    found = points(axes_with(figure, "Activations and their clusters"))[0]
    assert sorted(found[:, 0]) == sorted(tables["projection"]["x"])
    assert f"{alive.sum()} features that are active" in note(figure)


def test_axes_of_the_projection_tell_the_variance_they_explain(study, tmp_path):
    svg = plot("variant_concepts", study, tmp_path)["svg"].read_text()
    assert "principal component 1 (31\u202f% of variance)" in svg


def test_features_that_are_worth_nothing_are_counted_not_drawn(study):
    names = ("emergence", "checkpoints", "features", "projection")
    tables = {name: read_table(study.tables(name)[0]) for name in names}
    alive = np.flatnonzero(tables["features"]["density"] > 0)
    importance = tables["features"]["importance"].copy()
    importance[alive[:3]] = [-0.1, 0, np.nan]
    tables["features"]["importance"] = importance
    figure = drawn(variant_concepts.draw, variant_concepts.Concepts(**tables, facts={}), TITLE)
    assert len(points(axes_with(figure, "Importance and sensitivity"))[0]) == len(alive) - 3
    assert "(3 features, worth nothing or less, are not drawn)" in note(figure)

"""Figures of faithfulness: what they draw, from small tables made by hand."""

import numpy as np
import pytest

from circuitflow.plots import (
    agreement,
    composition,
    conditions,
    confidence,
    edge_faithfulness,
    faithfulness,
    faithfulness_conditions,
    outliers,
)
from circuitflow.plots.style import Style, drawing

STYLE = Style()


def columns(rows: list[dict]) -> dict[str, np.ndarray]:
    """A table of rows, text as objects."""
    found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {
        name: values.astype(object) if values.dtype.kind == "U" else values for name, values in found.items()
    }


def row(series, nodes, F, **more) -> dict:
    said = {
        "series": series,
        "source": "count",
        "threshold": 0.1,
        "nodes": nodes,
        "share": nodes / 100,
        "draw": -1,
    }
    said |= {
        "ablation": "mean",
        "start": "resid.0",
        "errors": "scored",
        "aggregate": "ratio_of_means",
        "main": True,
    }
    said |= {
        "F": F,
        "low": F - 0.1,
        "high": F + 0.1,
        "m_circuit": -1.0,
        "m_empty": 0.0,
        "m_full": -2.0,
        "n": 7,
    }
    return said | more


def table() -> dict[str, np.ndarray]:
    rows = []
    for nodes, F in ((1, 0.1), (10, 0.6), (100, 1.0)):
        rows += [row("circuit", nodes, F), row("complement", nodes, 1 - F)]
        rows += [row("random", nodes, 0.0, draw=draw, source="draw") for draw in range(3)]
        rows.append(row("circuit", nodes, F / 2, ablation="zero", main=False))
        rows.append(row("circuit", nodes, F / 3, errors="removed", main=False))
        rows.append(row("circuit", nodes, F / 4, start="resid.1", main=False))
        rows.append(row("neurons", nodes, F / 5, errors="none", main=False))
    rows += [row("circuit", 30, 0.8, source="assembled"), row("complement", 30, 0.2, source="assembled")]
    both = rows + [{**one, "aggregate": "mean_of_ratios", "main": False, "F": 9.0} for one in rows]
    return columns(both)


def lines(axes) -> dict[str, list]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def drawn(make):
    with drawing(STYLE):
        figure = make()
        figure.draw_without_rendering()
    return figure


def text(figure) -> str:
    return figure.get_supxlabel()


def test_the_curve_is_of_the_main_condition_alone():
    axes = drawn(lambda: faithfulness.draw(table(), {}, STYLE)).axes[0]
    found = lines(axes)
    assert found["C (faithfulness)"] == [0.1, 0.6, 1.0]
    assert found["circuits of neurons"] == pytest.approx([0.02, 0.12, 0.2])
    assert found["the assembled circuit"] == [0.8]
    assert len(conditions.main_rows(table())["F"]) == 3 * 5 + 2


def test_the_footnote_says_where_ablation_starts():
    """Tables of before name it as free, which it is not; raw names of conventions are no sentences."""
    said = {
        "ablation": "mean: nodes outside become their per-position mean",
        "start": "everything before resid.0 is free in C, in M and in the empty circuit",
        "aggregate": "ratio_of_means",
    }
    figure = drawn(lambda: faithfulness.draw(table(), said, STYLE))
    note = figure.get_supxlabel().replace("\n", " ")
    assert "Ablation by mean: nodes outside become" in note
    assert "Start: everything before resid.0 is free in C" in note
    assert "F: ratio of means over prompts." in note
    star = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert star
    assert all(line.get_linestyle() == "None" for line in star)


def test_agreement_tells_unit_and_number_of_nodes():
    nodes = {name: np.array([1.0, -2.0]) for name in ("score_train", "score_test")}
    nodes["kind"] = np.array(["feature", "error"], object)
    names = ("k", "overlap", "low", "high", "spearman", "spearman_low", "spearman_high", "nodes")
    values = (2, 0.5, 0.4, 0.6, 0.9, 0.8, 0.95, 37)
    found = {name: np.array([value]) for name, value in zip(names, values, strict=True)}
    found["site"] = np.array(["resid.3"], object)
    layers = {"split": np.array(["train", "test"], object), "n": np.array([1200, 80])}
    figure = drawn(lambda: agreement.draw(nodes, found, layers, STYLE, "nats"))
    assert figure.axes[0].get_xlabel() == "IE on train (nats)"
    assert figure.axes[2].get_xticklabels()[0].get_text() == "resid.3\n(37)"
    assert "n = 1,200 train pairs, 80 test pairs" in figure.get_supxlabel().replace("\n", " ")


def test_what_the_metric_says_depends_on_its_kind():
    assert outliers.said_of({"kind": "kl"}) == "0: as the whole model; the lower, the nearer to it"
    assert outliers.said_of({"kind": "log_probability"}) == "the lower, the more the model is right"
    assert outliers.said_of(None) == "negative: the model is right"


def test_a_table_without_conditions_is_drawn_as_before():
    plain = {
        k: v
        for k, v in conditions.main_rows(table()).items()
        if k not in ("main", "ablation", "start", "errors")
    }
    found = lines(drawn(lambda: faithfulness.draw(plain, {}, STYLE)).axes[0])
    assert found["C (faithfulness)"] == [0.1, 0.6, 1.0]
    assert "circuits of neurons" not in found


def area(series="circuit", **more) -> dict:
    said = {"series": series, "ablation": "mean", "start": "resid.0", "errors": "scored", "main": True}
    said |= {"aggregate": "ratio_of_means", "candidates": 100, "points": 3, "n": 7}
    for name, value in (("cpr", 0.8), ("cmd", 0.2)):
        said |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
    return said | more


def test_each_panel_changes_one_thing():
    areas = columns(
        [
            area(),
            area("complement", cpr=0.1),
            area(ablation="zero", main=False, cpr=0.4),
            area("neurons", errors="none", main=False, cpr=0.5, candidates=64),
            area(aggregate="mean_of_ratios", main=False, cpr=7.0),
        ]
    )
    figure = drawn(lambda: faithfulness_conditions.draw(table(), areas, STYLE))
    ablation, errors, start, cpr, cmd = figure.axes
    assert lines(ablation)["zero"] == pytest.approx([0.05, 0.3, 0.5])
    assert lines(errors)["all removed"] == pytest.approx([0.1 / 3, 0.2, 1 / 3])
    assert lines(start)["from resid.1"] == pytest.approx([0.025, 0.15, 0.25])
    for axes in (ablation, errors, start):
        (main,) = [values for label, values in lines(axes).items() if label.endswith("(main)")]
        assert main == [0.1, 0.6, 1.0]
    labels = [label.get_text() for label in cpr.get_yticklabels()]
    assert labels == ["main condition (of 100)", "ablation: zero (of 100)", "neurons (of 64)"]
    assert list(cpr.get_lines()[0].get_xdata()) == [0.8, 0.4, 0.5]
    assert list(cmd.get_lines()[0].get_xdata()) == [0.2, 0.2, 0.2]
    assert "n = 7 test prompts" in text(figure)


def test_bars_of_the_composition_fill_each_circuit():
    rows = []
    for source, nodes, parts in (
        ("count", 2, (2, 0, 0, 0)),
        ("count", 4, (2, 1, 0, 1)),
        ("assembled", 4, (4, 0, 0, 0)),
    ):
        places = (
            ("resid.0", "feature"),
            ("resid.0", "residual_error"),
            ("mlp.1", "feature"),
            ("mlp.1", "other_error"),
        )
        for (site, kind), count in zip(places, parts, strict=True):
            said = {"source": source, "nodes": nodes, "site": site, "kind": kind, "count": count}
            rows.append(said | {"share": count / nodes, "strength_share": count / nodes})
    figure = drawn(lambda: composition.draw(columns(rows), STYLE))
    kinds = figure.axes[0]
    heights = np.array([[bar.get_height() for bar in bars] for bars in kinds.containers])
    assert heights.sum(0) == pytest.approx([1, 1, 1])
    assert heights[0].tolist() == [1, 0.5, 1]  # features
    assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["2", "4", "★ 4"]


def test_outliers_are_ringed_and_counted():
    F = np.array([0.8, 0.9, 1.0, 1.1, 12.0])
    size = len(F)
    said = row("circuit", 30, 0.0, source="assembled")
    prompts = {
        name: np.full(size, value, object if isinstance(value, str) else None) for name, value in said.items()
    }
    prompts |= {"F": F, "m_empty": np.zeros(size), "m_full": -np.array([4.0, 3, 2, 2, 0.1])}
    prompts |= {"m_circuit": F * prompts["m_full"], "case": np.array(["a", "a", "b", "b", "b"], object)}
    prompts |= {"outlier": F > 5, "pair": np.arange(size)}
    figure = drawn(lambda: outliers.draw(prompts, STYLE))
    rings = figure.axes[2].collections[-1]
    assert rings.get_offsets().tolist() == [[-0.1, 12.0]]
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert labels[0] == "ratio of means 1.02"  # 11.3 / 11.1
    assert labels[1] == "mean of ratios 3.16"
    assert "1 of them lie beyond" in text(figure)


def test_confidence_shows_its_thresholds():
    rows = [
        {
            "split": split,
            "case": "all cases",
            "quantity": quantity,
            "threshold": at,
            "count": 5,
            "share": share,
        }
        | {"low": share - 0.1, "high": share + 0.1, "n": 10}
        for split in ("train", "test")
        for quantity in ("difference", "probability", "rank")
        for at, share in ((0.1, 0.9), (1.0, 0.5))
    ]
    chosen = {"min_difference": 0.5, "min_probability": 0.0, "max_rank": None}
    figure = drawn(lambda: confidence.draw(columns(rows), chosen, STYLE))
    first, second, third = figure.axes
    dotted = [[line for line in axes.get_lines() if line.get_linestyle() == ":"] for axes in figure.axes]
    assert [len(found) for found in dotted] == [1, 0, 0]
    assert list(dotted[0][0].get_xdata()) == [0.5, 0.5]
    assert "n = 10 train, n = 10 test" in text(figure)
    assert third.get_xscale() == second.get_xscale() == "log" != first.get_xscale()


def test_edges_are_drawn_by_their_number():
    rows = [
        row("circuit", 0, 0.0, source="none", edges=0),
        row("circuit", 5, 0.4, edges=10),
        row("circuit", 9, 0.9, edges=100, source="all"),
        row("circuit", 9, 0.7, edges=30, source="assembled"),
        *(row("random", 5, F, edges=10, source="draw") for F in (0.0, 0.1, 0.2)),
        row("nodes", 9, 0.95, edges=-1, source="assembled"),
        row("circuit", 5, 9.0, edges=10, aggregate="mean_of_ratios", main=False),
    ]
    figure = drawn(lambda: edge_faithfulness.draw(columns(rows), STYLE))
    found = lines(figure.axes[0])
    assert found["strongest edges"] == [0.4, 0.9]
    assert found["all 9 nodes, edges free"] == [0.95, 0.95]
    assert "3 random draws per size" in text(figure)

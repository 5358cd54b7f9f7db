"""Figures: they show the numbers they are given, the same bytes every time, with their provenance inside."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node, read_circuit
from circuitflow.data.proportions import wilson
from circuitflow.errors import UserError
from circuitflow.features.descriptions import read_descriptions
from circuitflow.models.sites import in_depth_order
from circuitflow.plots import (
    agreement,
    circuit,
    faithfulness,
    layer_importance,
    task_accuracy,
    top_features,
    training_curves,
)
from circuitflow.plots.circuit_layout import place
from circuitflow.plots.numbers import fixed, interval, number, percent, signed, whole
from circuitflow.plots.style import (
    Style,
    as_many_as_fit,
    drawable,
    drawing,
    fitting,
    style_of,
    text_width,
    wrapped,
)
from circuitflow.plots.tables import rows, top_nodes
from circuitflow.store.tables import read_table
from tests.fixtures.synthetic_page import PLOTS, plot
from tests.fixtures.synthetic_run import SITES, Run, write_run

STYLE = Style(dpi=60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("results") / "results" / "made-up")


def drawn(make: Any, *arguments: Any) -> Figure:
    with drawing(STYLE):
        return make(*arguments)


@pytest.mark.parametrize("name", PLOTS)
def test_every_figure_carries_its_provenance_and_nothing_of_the_moment(name, run, tmp_path):
    files = plot(name, run, tmp_path)
    image = Image.open(files["png"])
    assert json.loads(image.text["circuitflow"]) == {"stage": f"plot_{name}"}  # type: ignore[attr-defined]
    assert set(image.text) == {"circuitflow"}  # type: ignore[attr-defined]
    assert min(image.size) > 100
    svg = files["svg"].read_text()
    found = re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == {"stage": f"plot_{name}"}
    assert "<dc:date>" not in svg
    assert str(run.folder) not in svg


@pytest.mark.parametrize("name", PLOTS)
def test_equal_work_gives_equal_bytes(name, run, tmp_path):
    first, second = plot(name, run, tmp_path / "a"), plot(name, run, tmp_path / "b")
    for kind in ("png", "svg"):
        assert first[kind].read_bytes() == second[kind].read_bytes()


def test_bytes_do_not_depend_on_the_process_or_on_the_readers_settings(run, tmp_path):
    here = plot("circuit", run, tmp_path / "here")
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\nsvg.fonttype: none\n")
    inputs = {
        "circuit": str(run.circuit),
        "audit": str(run.audit),
        "features": [str(file) for file in run.features],
    }
    code = f"""
from pathlib import Path
from circuitflow.jobs import Output
from circuitflow.plots.circuit import plot_circuit

given = {inputs!r}
inputs = {{name: Path(given[name]) for name in ("circuit", "audit")}}
inputs["features"] = [Path(file) for file in given["features"]]
files = {{kind: Path({str(tmp_path)!r}) / f"circuit.{{kind}}" for kind in ("png", "svg")}}
out = Output(Path("."), files, {{"stage": "plot_circuit"}})
plot_circuit(inputs, {{"style": {{"dpi": 60}}, "max_edges": 100}}, out)
"""
    environment = {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    for kind in ("png", "svg"):
        assert (tmp_path / f"circuit.{kind}").read_bytes() == here[kind].read_bytes()


def test_drawing_leaves_no_trace_in_global_settings(run, tmp_path):
    before = dict(matplotlib.rcParams)
    plot("layer_importance", run, tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_plots_and_report_do_without_torch():
    modules = [f"circuitflow.plots.{name}" for name in PLOTS] + ["circuitflow.report.page"]
    code = (
        f"import sys, {', '.join(modules)}\nassert not {{'torch', 'transformers', 'zarr'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_palette_changes_the_picture(run, tmp_path):
    plain = plot("layer_importance", run, tmp_path / "a")["svg"].read_text()
    other = plot("layer_importance", run, tmp_path / "b", {"palette": {"error": "#123456"}})[
        "svg"
    ].read_text()
    assert "#123456" in other
    assert "#123456" not in plain


@pytest.mark.parametrize(
    ("style", "said"),
    [
        ({"palette": {"positve": "red"}}, "did you mean 'positive'"),
        ({"palette": {"error": "reddish"}}, "plots.palette.error: 'reddish' is not a colour"),
        ({"dpis": 3}, "plots.dpis is not a setting of the figures; did you mean 'dpi'"),
    ],
)
def test_mistakes_in_the_style_are_told(style, said):
    with pytest.raises(UserError, match=re.escape(said)):
        style_of({"style": style})


def test_sites_stand_in_the_order_of_computation():
    assert in_depth_order(["resid.12", "resid.2", "embed", "mlp.2", "resid.2"]) == [
        "embed",
        "mlp.2",
        "resid.2",
        "resid.12",
    ]


def test_wilson_interval_is_the_published_one():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.021345), "0.0213"),
        (number(-1.2), "−1.20"),
        (number(1234.5), "1\u202f234"),
        (number(1.2e-9), "1.20e−09"),
        (number(float("nan")), "–"),
        (signed(0.5, 2), "+0.50"),
        (signed(0), "0"),
        (fixed(-0.001), "0.00"),
        (interval(-0.2, 0.31), "[−0.20, 0.31]"),
        (interval(float("nan"), 1), ""),
        (percent(0.9876, 1), "98.8\u202f%"),
        (whole(60), "60"),
    ],
)
def test_numbers_as_text(text, expected):
    assert text == expected


def test_text_is_cut_to_the_room_there_is():
    assert fitting("short", 5, 9) == "short"
    cut = fitting("a rather long piece of text", 0.8, 9)
    assert cut.endswith("…")
    assert 0.5 < text_width(cut, 9) <= 0.8
    assert as_many_as_fit(["one", "two", "three"], text_width("one  two  ", 9), 9) == "one  two"
    lines = wrapped("some words that need more than one line", 1.0, 9)
    assert len(lines) > 1
    assert all(text_width(line, 9) <= 1.0 for line in lines)
    assert " ".join(lines) == "some words that need more than one line"
    for width in (0.5, 0.7, 0.9):
        assert not any(line.startswith("%") for line in wrapped("bars are 95 % intervals", width, 9))


def test_characters_without_a_glyph_are_written_as_code_points():
    assert drawable("é日") == "é\\u65e5"


def test_accuracy_is_the_share_of_positive_differences(run):
    table = {
        "split": np.array(["train"] * 4 + ["test"], object),
        "case": np.array(["b", "b", "a", "a", "a"], object),
        "difference": np.array([1.0, -1.0, 2.0, 3.0, -0.5]),
        "wrong_answer": np.array(["are"] * 5, object),
        "kept": np.ones(5, bool),
    }
    figure = drawn(task_accuracy.draw, table, STYLE)
    points = [container.lines[0].get_xdata().tolist() for container in figure.axes[0].containers]
    assert points == [[0.5, 1.0], [0.0, 0.0]]  # train: b, a; test: b has no prompts
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["b", "a"]  # in the order of the table


def test_layer_importance_shows_sums_and_intervals(run):
    table = read_table(run.layers)
    figure = drawn(layer_importance.draw, table, STYLE, "nats")
    left = figure.axes[0]
    train = rows(table, split="train")
    features, bars = left.containers[0].lines[0], left.containers[0].lines[2][0]
    assert np.allclose(features.get_ydata(), train["features"])
    low_high = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert np.allclose(low_high, np.stack([train["features_low"], train["features_high"]], 1))
    assert left.get_ylabel() == "Σ IE (nats)"


def test_agreement_shows_every_node_and_overlap(run):
    nodes, table, layers = (read_table(path) for path in (run.nodes, run.agreement, run.layers))
    left, above, below = drawn(agreement.draw, nodes, table, layers, STYLE).axes
    shown = np.concatenate([points.get_offsets() for points in left.collections])
    kind = np.argsort(nodes["kind"] == "error", kind="stable")
    assert np.allclose(shown, np.stack([nodes["score_train"], nodes["score_test"]], 1)[kind])
    k = int(table["k"].min())
    series = {container.get_label(): container.lines for container in above.containers}[f"k = {k}"]
    part = rows(table, k=k)
    assert np.allclose(series[0].get_ydata(), part["overlap"])
    assert np.allclose(bar_ends(series), np.stack([part["low"], part["high"]], 1))
    correlation = below.containers[0].lines
    assert np.allclose(correlation[0].get_ydata(), part["spearman"])
    assert np.allclose(bar_ends(correlation), np.stack([part["spearman_low"], part["spearman_high"]], 1))
    sites = [label.get_text().split()[0] for label in below.get_xticklabels()]
    assert sites == in_depth_order(table["site"])


def test_agreement_of_many_sites_stays_readable(run):
    """Names, note and marks of thirty sites have room of their own."""
    nodes, layers = read_table(run.nodes), read_table(run.layers)
    one = rows(read_table(run.agreement), site="resid.12")
    size = len(one["k"])
    table = {name: np.tile(column, 30) for name, column in one.items()}
    table["site"] = np.repeat([f"resid.{layer}" for layer in range(30)], size)
    figure = drawn(agreement.draw, nodes, table, layers, STYLE)
    figure.canvas.draw()
    names = [label.get_window_extent() for label in figure.axes[2].get_xticklabels()]
    assert not any(left.overlaps(right) for left, right in pairwise(names))
    legend = figure.axes[1].get_legend().get_window_extent()
    assert figure.axes[1].get_window_extent().contains(legend.x0, legend.y0)
    assert figure.axes[1].get_window_extent().contains(legend.x1, legend.y1)


def bar_ends(lines):
    return np.array([segment[:, 1] for segment in lines[2][0].get_segments()])


def test_faithfulness_shows_each_series_by_node_count(run):
    table = read_table(run.faithfulness)
    shuffled = {name: column[::-1] for name, column in table.items()}
    axes = drawn(faithfulness.draw, shuffled, {}, STYLE).axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    part = rows(table, series="circuit", source="count")
    assert np.array_equal(lines["C (faithfulness)"].get_xdata(), part["nodes"])
    assert np.array_equal(lines["C (faithfulness)"].get_ydata(), part["F"])
    star = lines["the assembled circuit"]
    assert (star.get_xdata()[0], star.get_ydata()[0], star.get_marker()) == (60, 0.87, "*")
    chance = rows(table, series="random", nodes=8)["F"]
    assert lines["random circuits (20 per size)"].get_ydata()[0] == pytest.approx(np.median(chance))
    assert axes.get_xscale() == "log"


def test_faithfulness_tells_conventions_and_what_lies_outside(run):
    table = read_table(run.faithfulness)
    table["F"] = table["F"].copy()
    table["F"][0] = 40
    figure = drawn(faithfulness.draw, table, {"start": "none", "metric": "long"}, STYLE)
    note = figure.get_supxlabel().replace("\n", " ")
    assert "n = 240 test prompts" in note
    assert "1 points lie outside" in note
    assert note.endswith(" Start: none.")
    assert figure.axes[0].get_ylim()[1] <= faithfulness.LIMITS[1]


def test_top_features_are_chosen_on_train_and_drawn_on_test(run):
    nodes = read_table(run.nodes)
    chosen = top_nodes(nodes, 12)
    sizes = np.abs(chosen["score_train"])
    assert sizes.tolist() == np.sort(np.abs(nodes["score_train"]))[::-1][:12].tolist()
    axes = drawn(top_features.draw, chosen, read_descriptions(run.features), STYLE).axes[0]
    assert np.allclose([bar.get_width() for bar in axes.patches], chosen["score_test"])
    colours = [to_hex(bar.get_facecolor()) for bar in axes.patches]
    expected = [STYLE.palette.positive if v >= 0 else STYLE.palette.negative for v in chosen["score_test"]]
    assert colours == expected


def boxes(figure: Figure) -> list[FancyBboxPatch]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]


def test_the_circuit_shows_every_node_once_and_the_strongest_edges(run):
    value, found = read_circuit(run.circuit), read_descriptions(run.features)
    figure = drawn(circuit.draw, circuit.Drawing(value, found, 50), STYLE)
    gids = [str(patch.get_gid()) for patch in figure.axes[0].patches]
    assert sorted(gid for gid in gids if gid.startswith("node")) == sorted(
        f"node-{i}" for i in range(len(value.nodes))
    )
    edges = [gid for gid in gids if gid.startswith("edge")]
    numbers = {node.id: str(i) for i, node in enumerate(value.nodes)} | {METRIC: "m"}
    strongest = sorted(value.edges, key=lambda edge: -abs(edge.weight))[:50]
    assert edges == [f"edge-{numbers[edge.up]}-{numbers[edge.down]}" for edge in reversed(strongest)]
    texts = [text.get_text().replace("\n", " ") for text in figure.axes[0].texts]
    assert any(
        f"{len(value.nodes)} nodes, the 50 strongest of {len(value.edges)} edges" in text for text in texts
    )
    assert "made-up · agreement" in texts


def test_boxes_of_the_circuit_do_not_overlap_and_stay_inside(run):
    figure = drawn(circuit.draw, circuit.Drawing(read_circuit(run.circuit), {}, 50), STYLE)
    width, height = figure.get_size_inches()
    extents = sorted((box.get_y(), box.get_x(), box.get_width(), box.get_height()) for box in boxes(figure))
    for y, x, w, h in extents:
        assert x > 0
        assert y > 0
        assert x + w < width
        assert y + h < height
    lines = {y: [item for item in extents if item[0] == y] for y, *_ in extents}
    assert len(lines) > len(SITES)  # no site fits into one line
    for line in lines.values():
        assert all(left[1] + left[2] + 0.05 < right[1] for left, right in pairwise(line))
    assert all(low + 0.2 < high for low, high in pairwise(sorted(lines)))


def test_labels_of_the_circuit_stay_in_their_boxes(run):
    figure = drawn(
        circuit.draw, circuit.Drawing(read_circuit(run.circuit), read_descriptions(run.features), 5), STYLE
    )
    renderer = FigureCanvasAgg(figure).get_renderer()
    frames = [box.get_window_extent(renderer) for box in boxes(figure)]
    for text in figure.axes[0].texts:
        extent = text.get_window_extent(renderer)
        around = [
            f for f in frames if f.y0 < extent.y0 + extent.height / 2 < f.y1 and f.x0 <= extent.x0 < f.x1
        ]
        assert all(extent.x1 <= frame.x1 + 1 for frame in around), text.get_text()


def test_sign_sets_colour_and_size_sets_width():
    nodes = (Node("resid.0", "feature", 1, 0.5), Node("resid.1", "error", -1, -0.2))
    edges = (Edge("resid.0/1", "resid.1/error", -0.1), Edge("resid.1/error", METRIC, -0.2))
    value = Circuit(("resid.0", "resid.1"), nodes, edges)
    figure = drawn(circuit.draw, circuit.Drawing(value, {}, 10), STYLE)
    lines = {patch.get_gid(): patch for patch in figure.axes[0].patches}
    negative = STYLE.palette.negative
    assert [to_hex(lines[gid].get_edgecolor()) for gid in ("edge-0-1", "edge-1-m")] == [negative, negative]
    assert lines["edge-1-m"].get_linewidth() == circuit.THICKEST
    assert lines["edge-0-1"].get_linewidth() == pytest.approx(circuit.edge_width(0.5))
    assert to_hex(lines["node-0"].get_edgecolor()) == STYLE.palette.positive
    markers = [line.get_marker() for line in figure.axes[0].lines if line.get_marker() in ("o", "^", "D")]
    assert markers == ["o", "^", "D"]


@pytest.mark.parametrize("sites", [1, 12])
def test_circuits_of_any_shape_can_be_drawn(sites):
    names = tuple(f"resid.{i}" for i in range(sites))
    nodes = tuple(Node(name, "feature", i, 0.1) for name in names for i in range(2))
    figure = drawn(circuit.draw, circuit.Drawing(Circuit(names, nodes, ()), {}, 10), STYLE)
    assert len(boxes(figure)) == 2 * sites


def test_an_empty_circuit_is_drawn_too():
    figure = drawn(circuit.draw, circuit.Drawing(Circuit(("resid.0",), (), ()), {}, 10), STYLE)
    assert not boxes(figure)


def test_rows_are_ordered_so_that_strong_edges_do_not_cross():
    columns = {"a": ["a0", "a1", "a2"], "b": ["b0", "b1", "b2"]}
    edges = [("a0", "b2", 1.0), ("a1", "b1", -1.0), ("a2", "b0", 1.0)]
    _, layout = place(columns, edges)
    order = {site: sorted(nodes, key=lambda node: layout.places[node][0]) for site, nodes in columns.items()}
    partner = {"a0": "b2", "a1": "b1", "a2": "b0"}
    assert [partner[node] for node in order["a"]] == order["b"]


def test_curves_are_those_of_the_logs_and_made_dictionaries_have_none(run):
    curves = training_curves.read_curves(run.dictionaries[::-1])
    assert tuple(curves) == SITES
    first = curves[SITES[0]]
    assert first["held_step"].tolist() == list(range(0, 4001, 200))
    assert len(first["step"]) == 2 * len(first["held_step"])
    axes = drawn(training_curves.draw, curves, STYLE).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert np.array_equal(lines["resid.12"].get_ydata(), curves["resid.12"]["fvu"])
    log = run.folder / "objects" / "saeresid6" / "log.jsonl"
    kept = log.read_text()
    log.write_text("")
    try:
        assert tuple(training_curves.read_curves(run.dictionaries)) == SITES[1:]
    finally:
        log.write_text(kept)


def test_training_curves_without_any_training_say_so():
    figure = drawn(training_curves.draw, {}, STYLE)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no dictionary was trained"]

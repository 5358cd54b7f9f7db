"""Figures of circuits over every kind of site: places, ways of edges, positions, methods, stability."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from circuitflow.circuits.circuit import METRIC, Circuit, Edge, Node, write_circuit
from circuitflow.errors import UserError
from circuitflow.features.descriptions import read_descriptions
from circuitflow.jobs import Output
from circuitflow.plots import circuit as plain
from circuitflow.plots import circuit_positions, methods, stability
from circuitflow.plots.circuit_cells import BOX, GAP, arrange, key
from circuitflow.plots.circuit_layout import ACROSS, lane_of, place
from circuitflow.plots.circuit_marks import Drawing, chosen_how, words_of
from circuitflow.plots.circuit_routes import curve, routes
from circuitflow.plots.style import Style, drawing
from circuitflow.store.tables import read_table, write_table
from tests.fixtures import synthetic_audit
from tests.fixtures import synthetic_circuit as made

STYLE = Style(dpi=60)
SHARE = 0.3


@pytest.fixture(scope="module")
def value() -> Circuit:
    return made.circuit()


@pytest.fixture(scope="module")
def folder(value: Circuit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("circuit")


@pytest.fixture(scope="module")
def stages(value: Circuit, folder: Path) -> dict[str, Any]:
    """Stage, inputs and params of every figure here."""
    write_circuit(folder / "circuit.json", value)
    features = made.write_features(folder, value)
    circuit = {"circuit": folder / "circuit.json", "features": features}
    positions = {
        "positions": made.write_positions(folder, value),
        "tokens": made.write_tokens(folder / "t.parquet"),
    }
    summary, nodes = made.write_methods(folder)
    stable_nodes, stable_edges = made.write_stability(folder, value)
    limits = {"max_nodes": 60, "max_edges": 150, "share": SHARE, "case": None}
    return {
        "circuit": (plain.plot_circuit, circuit, {"max_edges": 150}),
        "positions": (circuit_positions.plot_circuit_positions, {**circuit, **positions}, limits),
        "methods": (methods.plot_methods, {"agreement": summary, "nodes": nodes}, {}),
        "stability": (
            stability.plot_stability,
            {"nodes": stable_nodes, "edges": stable_edges},
            {"max_rows": 30},
        ),
    }


def drawn(make: Any, *arguments: Any) -> Figure:
    with drawing(STYLE):
        return make(*arguments)


@pytest.mark.parametrize("name", ["circuit", "positions", "methods", "stability"])
def test_equal_work_gives_equal_bytes(name, stages, tmp_path):
    stage, inputs, params = stages[name]
    for turn in ("a", "b"):
        files = {kind: tmp_path / f"{turn}.{kind}" for kind in ("png", "svg")}
        stage(inputs, {"style": {"dpi": 60}, **params}, Output(tmp_path, files, {"stage": name}))
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_the_figures_do_without_torch():
    names = ("circuit", "circuit_positions", "methods", "stability")
    modules = ", ".join(f"circuitflow.plots.{name}" for name in names)
    code = f"import sys, {modules}\nassert not {{'torch', 'transformers', 'zarr'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["circuit", "positions"])
def test_the_audit_ends_the_note_of_a_circuit(name, stages, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(
        {"circuit": plain, "positions": circuit_positions}[name],
        "legend",
        lambda axes, drawn, told, width, style: notes.append(told),
    )
    write_table(tmp_path / "audit.parquet", synthetic_audit.summary())
    stage, inputs, params = stages[name]
    for given in ({}, {"audit": tmp_path / "audit.parquet"}):
        files = {kind: tmp_path / f"a.{kind}" for kind in ("png", "svg")}
        stage({**inputs, **given}, {"style": {"dpi": 60}, **params}, Output(tmp_path, files, {"stage": name}))
    without, told = notes
    assert "Audit" not in without
    assert told.startswith(
        f"{without} Audit: nodes, 20\u202f% of Σ|effect| lies outside, at most 27\u202f% (95 %, for these pairs); "
    )
    assert told.endswith("on 16 test pairs.")


def columns_of(value: Circuit) -> dict[str, list[str]]:
    return {site: [node.id for node in value.at(site)] for site in value.sites}


@pytest.mark.parametrize("count", [60, 100])
def test_deeper_sites_stand_higher_and_no_boxes_meet(count):
    value = made.circuit(count)
    grid, layout = place(columns_of(value), [(e.up, e.down, e.weight) for e in value.edges])
    depths = [made.SITES.index(line.site) for line in layout.lines]
    assert depths == sorted(depths)
    assert set(layout.places) == {node.id for node in value.nodes}
    for line in layout.lines:
        lefts = [layout.places[node][0] for node in line.nodes]
        assert len(lefts) <= ACROSS
        assert all(a + grid.box < b for a, b in pairwise(lefts))
        assert lefts[0] >= grid.left
        assert lefts[-1] + grid.box <= layout.width
    assert all(a.y + grid.height < b.y for a, b in pairwise(layout.lines))
    assert layout.metric[1] > layout.lines[-1].y + grid.height / 2


def test_lanes_start_from_their_sides():
    columns = {"attn.0": ["a"], "mlp.0": ["b"], "resid.0": ["c"]}
    _, layout = place(columns, [])
    assert layout.places["a"][0] < layout.places["b"][0] < layout.places["c"][0]
    assert [lane_of(site) for site in ("z.3", "embed", "resid_mid.1")] == [0, 1, 2]
    _, alone = place({"resid.0": ["c"]}, [])
    assert alone.places["c"][0] == pytest.approx(layout.places["b"][0])


@pytest.mark.parametrize("count", [60, 100])
def test_edges_pass_beside_boxes(count):
    value = made.circuit(count)
    edges = [(edge.up, edge.down) for edge in value.edges]
    grid, layout = place(columns_of(value), [(e.up, e.down, e.weight) for e in value.edges])
    ways = routes(edges, grid, layout)
    assert set(ways) == set(edges)
    passed = 0
    for way in ways.values():
        heights = [y for _, y in way]
        assert heights == sorted(heights)
        assert all(0 < x < layout.width for x, _ in way)
        for (x0, y0), (x1, y1) in pairwise(way):
            for line in layout.lines:
                if y0 < line.y < y1:  # upright beside the boxes of this line
                    passed += 1
                    assert x0 == x1
                    lefts = [layout.places[node][0] for node in line.nodes]
                    assert all(not left < x0 < left + grid.box for left in lefts)
    assert passed > 50


def test_edges_end_at_the_boxes_they_join(value):
    grid, layout = place(columns_of(value), [])
    for (up, down), way in routes(
        [(e.up, e.down) for e in value.edges if e.down != METRIC], grid, layout
    ).items():
        for (x, y), node, side in ((way[0], up, 1), (way[-1], down, -1)):
            left, middle = layout.places[node]
            assert left < x < left + grid.box
            assert y == pytest.approx(middle + side * grid.height / 2)


def test_a_straight_way_is_a_line_and_others_are_curves():
    assert curve([(0, 0), (0, 1)]) == ([(0, 0), (0, 1)], [1, 2])
    vertices, codes = curve([(0, 0), (1, 1)])
    assert codes == [1, 4, 4, 4]
    assert vertices[1][0] == 0
    assert vertices[2][0] == 1


def test_every_edge_is_drawn_from_the_last_site_whole_from_others_as_a_stub(value):
    figure = drawn(plain.draw, Drawing(value, {}, 150), STYLE)
    axes = figure.axes[0]
    numbers = {node.id: str(i) for i, node in enumerate(value.nodes)} | {METRIC: "m"}
    patches = {str(item.get_gid()) for item in axes.patches}
    stubs = {str(item.get_gid()) for item in axes.lines if str(item.get_gid()).startswith("edge")}
    last = {node.id for node in value.at("resid.19")}
    for edge in value.edges:
        gid = f"edge-{numbers[edge.up]}-{numbers[edge.down]}"
        assert gid in (stubs if edge.down == METRIC and edge.up not in last else patches)
    assert stubs


def test_type_is_readable_where_the_figure_is_1200_pixels_wide(value, stages):
    found = read_descriptions(stages["circuit"][1]["features"])
    for figure in (
        drawn(plain.draw, Drawing(value, found, 150), STYLE),
        drawn(circuit_positions.draw, Drawing(value, found, 150), spread(value, stages), STYLE),
    ):
        scale = 1200 / figure.get_size_inches()[0] / 72
        assert min(text.get_fontsize() for text in figure.axes[0].texts) * scale > 10.5
        labels = [text for text in figure.axes[0].texts if text.get_text().startswith("#")]
        assert min(text.get_fontsize() for text in labels) * scale > 11.5


def spread(value: Circuit, stages: dict[str, Any], case: str | None = None) -> circuit_positions.Spread:
    inputs = stages["positions"][1]
    tables = dict(zip(value.sites, map(read_table, inputs["positions"]), strict=True))
    return circuit_positions.spread_of(value.nodes, tables, read_table(inputs["tokens"]), case, SHARE)


def test_nodes_stand_where_a_share_of_their_effect_arises(value, stages):
    found = spread(value, stages)
    assert (found.case, found.pairs) == ("within_relative", 60)
    assert found.clean == list(made.TOKENS)
    assert found.patched[2] == " key"
    scores = {node.id: node.score for node in value.nodes}
    assert set(found.places) == set(scores)
    for name, places in found.places.items():
        assert 1 not in places  # test rows do not count
        assert places[7] == pytest.approx(scores[name] * (0.4 if len(places) > 1 else 0.8), rel=0.6)
    table = {
        "split": np.array(["train"] * 2, object),
        "case": np.array(["a"] * 2, object),
        "position": np.array([1, 2]),
        "kind": np.array(["error"] * 2, object),
        "feature": np.array([-1, -1]),
        "score": np.array([-0.3, 0.1]),
        "n": np.array([5, 5]),
    }
    tokens = {"case": ["a"], "clean_tokens": [["x", "y", "z"]], "patch_tokens": [["x", "y", "w"]]}
    given = {name: np.array(column, object) for name, column in tokens.items()}
    nodes = [Node("resid.0", "error", -1, 1.0), Node("resid.0", "feature", 3, 1.0, 0)]
    for share, expected in ((0.3, {1: -0.3}), (0.2, {1: -0.3, 2: 0.1})):
        places = circuit_positions.spread_of(nodes, {"resid.0": table}, given, "a", share).places
        assert places == {"resid.0/error": expected, "resid.0/3@0": {0: 1.0}}


def test_an_unknown_case_is_told(value, stages):
    with pytest.raises(UserError, match=re.escape("did you mean 'simple'")):
        spread(value, stages, "simpel")


def test_columns_are_positions_and_boxes_stay_in_them(value, stages):
    found = spread(value, stages)
    cells = arrange(value, found.places, len(found.clean))
    assert list(cells.columns) == list(range(8))
    taken: dict[float, list[float]] = {}
    for node, places in found.places.items():
        site = node.partition("/")[0]
        for at in places:
            x, y = cells.layout.places[key(node, at)]
            left, width = cells.columns[at]
            low, high = cells.bands[site]
            assert left < x
            assert x + BOX < left + width
            assert low < y < high
            taken.setdefault(y, []).append(x)
    for row in taken.values():
        assert all(a + BOX + GAP <= b + 1e-9 for a, b in pairwise(sorted(row)))


def test_a_circuit_with_positions_needs_no_tables(stages):
    value = made.circuit(30, positions=True)
    found = circuit_positions.spread_of(
        value.nodes, {}, read_table(stages["positions"][1]["tokens"]), None, SHARE
    )
    figure = drawn(circuit_positions.draw, Drawing(value, {}, 80), found, STYLE)
    boxes = [patch.get_gid() for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    assert sorted(boxes) == sorted(f"node-{i}" for i in range(len(value.nodes)))


def test_labels_stay_in_their_boxes(value, stages):
    found = read_descriptions(stages["circuit"][1]["features"])
    for figure in (
        drawn(plain.draw, Drawing(value, found, 9), STYLE),
        drawn(circuit_positions.draw, Drawing(value, found, 9), spread(value, stages), STYLE),
    ):
        renderer = FigureCanvasAgg(figure).get_renderer()
        patches = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
        frames = [patch.get_window_extent(renderer) for patch in patches]
        for text in figure.axes[0].texts:
            extent = text.get_window_extent(renderer)
            x, y = extent.x0 + 1, (extent.y0 + extent.y1) / 2
            around = [frame for frame in frames if frame.y0 < y < frame.y1 and frame.x0 < x < frame.x1]
            assert all(extent.x1 <= frame.x1 + 2 for frame in around), text.get_text()


def test_how_nodes_were_chosen_is_said(value):
    assert (
        chosen_how(value)
        == "Chosen: nodes by top 60 of 1581; edges by top 150 of 620; all edges into the metric."
    )
    other = Circuit((), (), (), {"nodes": {"effect_share": 0.9}, "prune": "source_to_sink"})
    assert (
        chosen_how(other)
        == "Chosen: nodes by effect share 0.900; pruned source to sink; all edges into the metric."
    )
    assert chosen_how(Circuit((), (), ())) == ""


def test_a_feature_that_fires_nowhere_shows_what_it_promotes():
    told = {"fires_on": [], "logits": {"top": [{"token": " is"}]}}
    assert words_of(told) == ["→·is"]
    assert words_of({**told, "fires_on": [{"token": " a"}]}) == ["·a"]
    assert words_of(None) == []


def test_methods_are_shown_per_site_with_intervals(stages):
    table, nodes = (read_table(path) for path in stages["methods"][1].values())
    figure = drawn(methods.draw, table, nodes, STYLE)
    pearson, slope, *scatters = figure.axes
    assert [bars.get_label() for bars in pearson.containers] == ["AtP", "integrated gradients", "RelP"]
    here = (table["method"] == "ig") & (table["k"] == 10)
    assert np.allclose(pearson.containers[1].lines[0].get_ydata(), table["pearson"][here])
    ends = np.array([segment[:, 1] for segment in slope.containers[1].lines[2][0].get_segments()])
    assert np.allclose(ends, np.stack([table["slope_low"], table["slope_high"]], 1)[here])
    assert len(scatters) == 3
    features, errors = scatters[0].collections
    assert len(errors.get_offsets()) == len(made.SITES)
    seen = (nodes["method"] == "atp") & (nodes["kind"] == "feature")
    assert np.allclose(features.get_offsets(), np.stack([nodes["reference"], nodes["score"]], 1)[seen])
    note = figure.get_supxlabel().replace("\n", " ")
    assert "with exact patching of the same nodes" in note
    assert "n: 20 nodes per site" in note


def test_methods_without_intervals_and_without_signs_are_told(stages):
    table, nodes = (read_table(path) for path in stages["methods"][1].values())
    for name in ("pearson_low", "slope_high"):
        table[name] = np.full(len(table["n"]), np.nan)
    table["slope"] = table["slope"].copy()
    table["slope"][0] = 40
    for given in (table, nodes):
        given["method"] = np.where(given["method"] == "atp", "decoder_only", given["method"]).astype(object)
    note = drawn(methods.draw, table, nodes, STYLE).get_supxlabel().replace("\n", " ")
    assert "1 slopes lie outside the frame" in note
    assert "compared with |exact patching|" in note


def test_stability_shows_what_is_in_the_circuit(stages):
    nodes, edges = (stability.inside(read_table(path)) for path in stages["stability"][1].values())
    assert bool(nodes["in_circuit"].all())
    figure = drawn(stability.draw, nodes, edges, 12, STYLE)
    effects, shares, every = figure.axes[:3]
    strongest = np.argsort(-np.abs(nodes["score"]), kind="stable")[:12]
    first = next(i for i, row in enumerate(strongest) if nodes["kind"][row] == "feature")
    assert effects.collections[1].get_offsets()[0].tolist() == [nodes["score"][strongest[first]], first]
    assert np.allclose(np.asarray(shares.collections[1].get_offsets())[:, 0], nodes["selected"][strongest])
    assert sum(bar.get_height() for bar in every.patches) == len(nodes["score"])
    assert "100 resamples of 240 training pairs" in figure.get_supxlabel().replace("\n", " ")


def test_stability_of_a_circuit_without_edges(stages):
    nodes, edges = (stability.inside(read_table(path)) for path in stages["stability"][1].values())
    none = {name: column[:0] for name, column in edges.items()}
    figure = drawn(stability.draw, nodes, none, 5, STYLE)
    assert figure.axes[5].get_title(loc="left") == "All 0: none"


def test_an_empty_circuit_is_drawn_too():
    figure = drawn(plain.draw, Drawing(Circuit(("embed",), (), ()), {}, 5), STYLE)
    assert not [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    edge = Edge("embed/1", METRIC, 0.5)
    one = Circuit(("embed",), (Node("embed", "feature", 1, 0.5),), (edge,))
    assert drawn(plain.draw, Drawing(one, {}, 5), STYLE).axes

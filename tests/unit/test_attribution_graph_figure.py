"""The figure of an attribution graph: where nodes stand, how edges pass them, what is drawn and told."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import FancyBboxPatch, PathPatch

from circuitflow.graphs.formats.viewer import Told, write_viewer
from circuitflow.graphs.formats.viewer_reading import read_viewer
from circuitflow.graphs.graph import NO_TOKEN
from circuitflow.graphs.influence import prune, scores
from circuitflow.jobs import Output
from circuitflow.plots.attribution_graph import Picture, draw, note, plot_attribution_graph
from circuitflow.plots.graph_layout import BOX, GAP, HEIGHT, LEFT, LOGITS, TOKENS, arrange
from circuitflow.plots.graph_routes import rounded_curve, straight_routes
from circuitflow.plots.numbers import THIN, counted
from circuitflow.plots.style import Style, drawing
from tests.fixtures.synthetic_graph import large, small

STYLE = Style(dpi=60)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of 60 to 100 nodes with labels, as export_graph leaves it."""
    graph = large(160)
    kept = prune(graph, 0.75, 0.9)
    assert 40 < kept.nodes[: graph.first_token].sum() < 100
    labels = {(int(layer), int(feature)): "keys, cities → are" for layer, _, feature in graph.features[::2]}
    pruning = {"node_threshold": 0.75, "edge_threshold": 0.9}
    facts = {"scores": scores(graph)._asdict(), "sizes": {"features": 500, "errors": len(graph.errors)}}
    path = tmp_path_factory.mktemp("graph") / "graph.json"
    write_viewer(path, graph, kept, Told("keys", "toy", labels=labels, pruning=pruning, facts=facts))
    return path


def picture_of(file: Path, nodes: int = 80, edges: int = 120) -> Picture:
    return Picture(read_viewer(file), nodes, edges)


def boxes_of(picture: Picture) -> dict[str, tuple[float, float, float, float]]:
    """Left, bottom, right, top of every box that is no token."""
    graph, places = picture.view.graph, picture.place.layout.places
    tokens = {str(graph.first_token + at) for at in range(graph.n_pos)}
    return {
        node: (x, y - HEIGHT / 2, x + BOX, y + HEIGHT / 2)
        for node, (x, y) in places.items()
        if node not in tokens
    }


def test_deeper_layers_stand_higher_and_nodes_in_their_columns(file: Path) -> None:
    picture = picture_of(file)
    graph, place = picture.view.graph, picture.place
    layers, positions = graph.layers(), graph.positions()
    names = list(place.bands)
    assert (names[0], names[-1]) == (TOKENS, LOGITS)
    assert [int(name.split()[1]) for name in names[1:-1]] == sorted(
        {int(layers[node]) for node in picture.inner}
    )
    for low, high in pairwise(place.bands.values()):
        assert low[1] == pytest.approx(high[0])
    for node in picture.inner:
        x, y = place.layout.places[str(node)]
        left, width = place.columns[int(positions[node])]
        bottom, top = place.bands[f"layer {layers[node]}"]
        assert left <= x
        assert x + BOX <= left + width + 1e-9
        assert bottom < y - HEIGHT / 2
        assert y + HEIGHT / 2 < top


@pytest.mark.parametrize(("logits", "rows"), [(3, 1), (10, 2)])
def test_logits_stand_above_the_last_position(logits: int, rows: int) -> None:
    names = [f"out{number}" for number in range(logits)]
    tokens = {0: "t0", 1: "t1", 2: "t2"}
    for last in (["a"], [f"a{number}" for number in range(9)]):
        place = arrange({0: {0: ["b", "c", "d"], 2: last}}, tokens, names)
        boxes = [place.layout.places[name] for name in names]
        left, width = place.columns[2]
        wide = min(logits, 5) * (BOX + GAP) + GAP
        assert len({y for _, y in boxes}) == rows
        assert min(x for x, _ in boxes) >= min(left, left + width - wide)
        assert max(x for x, _ in boxes) + BOX <= max(left + width, LEFT + wide)
        top = max(y for _, y in boxes)
        assert place.layout.places["out0"] == (max(x for x, y in boxes if y == top), top)


def test_the_last_column_goes_on_around_the_logits(file: Path) -> None:
    picture = picture_of(file)
    with drawing(STYLE):
        axes = draw(picture, STYLE).axes[0]
    low, high = picture.place.bands[LOGITS]
    left, width = picture.place.columns[picture.view.graph.n_pos - 1]
    borders = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) == 3]
    assert [list(border[0]) for border in borders] == [[left, low], [left + width, low]]
    assert {border[2][1] for border in borders} == {high}
    logits = [
        picture.place.layout.places[str(node)][0]
        for node in range(picture.view.graph.first_logit, picture.view.graph.n_nodes)
    ]
    assert borders[0][2][0] < min(logits)
    assert borders[1][2][0] > max(logits) + BOX
    assert f"after {picture.view.graph.n_pos - 1}" in [text.get_text() for text in axes.texts]


def test_boxes_do_not_meet(file: Path) -> None:
    boxes = list(boxes_of(picture_of(file)).values())
    for number, (l0, b0, r0, t0) in enumerate(boxes):
        for l1, b1, r1, t1 in boxes[number + 1 :]:
            assert r0 <= l1 or r1 <= l0 or t0 <= b1 or t1 <= b0


def test_edges_pass_beside_boxes(file: Path) -> None:
    """No straight part of an edge runs through a box that is not one of its ends."""
    picture = picture_of(file)
    kept, boxes = picture.view.kept, boxes_of(picture)
    ends = [(str(kept.edges[edge, 1]), str(kept.edges[edge, 0])) for edge in picture.edges]
    ways = straight_routes(ends, picture.place.grid, picture.place.layout)
    bends = 0
    for (up, down), way in ways.items():
        bends += len(way) > 2
        for (x0, y0), (x1, y1) in pairwise(way):
            for share in np.linspace(0, 1, 50):
                x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
                for node, (left, bottom, right, top) in boxes.items():
                    if node not in (up, down):
                        assert not (left < x < right and bottom < y < top), (up, down, node)
    assert 0 < bends < len(ways) - 10


def test_a_way_that_nothing_blocks_is_straight() -> None:
    place = arrange({0: {1: ["a"]}, 1: {0: ["b"]}, 2: {1: ["c"]}}, {0: "t0", 1: "t1"}, ["out"])
    ways = straight_routes([("t0", "b"), ("a", "c"), ("t1", "c")], place.grid, place.layout)
    assert [len(way) for way in ways.values()] == [
        2,
        2,
        4,
    ]  # a stands between t1 and c: below it and above it


def test_corners_are_rounded_without_leaving_the_way() -> None:
    vertices, codes = rounded_curve([(0.0, 0.0), (1.0, 0.0), (1.0, 0.1)])
    assert vertices == [(0.0, 0.0), (0.88, 0.0), (1.0, 0.0), (1.0, 0.05), (1.0, 0.1)]
    assert codes == [1, 2, 3, 3, 2]


def test_limits_keep_the_most_influential(file: Path) -> None:
    picture = picture_of(file, nodes=10, edges=15)
    kept, graph = picture.view.kept, picture.view.graph
    assert len(picture.inner) == 10
    least = min(picture.influence[picture.inner])
    assert all(
        picture.influence[node] <= least for node in range(graph.first_token) if node not in picture.inner
    )
    assert len(picture.edges) == 15
    ends = set(kept.edges[picture.edges].ravel().tolist())
    assert all(node in picture.inner or node >= graph.first_token for node in ends)
    features = sum(node < graph.first_error for node in picture.inner)
    assert 0 < features < 10
    told = note(picture)
    assert f"{features} features of {len(graph.features)} kept of 500" in told
    assert f"{counted(10 - features, 'error')} of {len(graph.errors)} kept" in told


def test_combinations_of_logits_have_a_weight_and_no_probability(file: Path) -> None:
    picture = picture_of(file)
    assert "weight in its place" not in note(picture)
    graph = replace(
        picture.view.graph, logits=np.array([31, 32, NO_TOKEN]), probabilities=np.array([0.5, 0.2, 2.0])
    )
    changed = replace(picture, view=replace(picture.view, graph=graph))
    with drawing(STYLE):
        words = [text.get_text() for text in draw(changed, STYLE).axes[0].texts]
    assert "weight 2.00" in words
    assert f"50.0{THIN}%" in words
    assert f"200.0{THIN}%" not in words
    assert "Combinations of logits have a weight in its place." in note(changed)


def test_what_is_drawn_can_be_found_in_the_svg(file: Path) -> None:
    picture = picture_of(file)
    with drawing(STYLE):
        figure = draw(picture, STYLE)
    patches = figure.axes[0].patches
    names = [str(patch.get_gid()) for patch in patches if isinstance(patch, FancyBboxPatch)]
    graph = picture.view.graph
    drawn = [*picture.inner, *range(graph.first_token, graph.n_nodes)]
    assert sorted(names) == sorted(f"node-{graph.node_id(node)}" for node in drawn)
    edges = [patch for patch in patches if isinstance(patch, PathPatch) and "edge" in str(patch.get_gid())]
    assert len(edges) == len(picture.edges)
    widths = [patch.get_linewidth() for patch in edges]
    assert widths == sorted(widths)  # the strongest on top
    signs = {patch.get_edgecolor()[:3] for patch in edges}
    assert len(signs) == 2


def test_the_note_tells_scores_pruning_and_counts(file: Path) -> None:
    picture = picture_of(file)
    told = note(picture)
    graph = large(160)
    found = scores(graph)
    assert f"replacement {found.replacement:.2f}, completeness {found.completeness:.2f}" in told
    assert "Pruned: nodes to 75\u202f%, edges to 90\u202f% of their influence" in told
    assert "kept of 500" in told
    assert f"the 120 strongest of {len(picture.view.kept.edges)} edges" in told


@pytest.mark.parametrize(
    ("expanded", "said"),
    [(64, "the part that has rows (64 of 599 active features)"), (599, "the whole graph")],
)
def test_the_note_tells_of_what_part_the_scores_are(file: Path, expanded: int, said: str) -> None:
    picture = picture_of(file)
    graph = picture.view.graph
    facts = {**graph.facts, "expanded_features": expanded, "active_features": 599}
    changed = replace(picture, view=replace(picture.view, graph=replace(graph, facts=facts)))
    assert f"Scores of {said}: replacement" in note(changed)


def test_long_prompts_show_the_columns_that_matter() -> None:
    graph = large(30, tokens=tuple(f" t{number}" for number in range(40)))
    kept = prune(graph, 0.3, 0.5)
    view = read_viewer_of(graph, kept)
    picture = Picture(view, 6, 10)
    assert 39 in picture.place.columns
    assert len(picture.place.columns) < 40
    for edge in picture.edges:
        up = int(view.kept.edges[edge, 1])
        assert str(up) in picture.place.layout.places


def read_viewer_of(graph: Any, kept: Any) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_viewer(Path(folder) / "graph.json", graph, kept, Told("long", "toy"))
        return read_viewer(Path(folder) / "graph.json")


@pytest.mark.parametrize("turn", ["small", "large"])
def test_equal_work_gives_equal_bytes(turn: str, file: Path, tmp_path: Path) -> None:
    graph = small()
    write_viewer(tmp_path / "small.json", graph, prune(graph, 1.0, 1.0), Told("small", "toy"))
    source = file if turn == "large" else tmp_path / "small.json"
    for name in ("a", "b"):
        files = {kind: tmp_path / f"{name}.{kind}" for kind in ("png", "svg")}
        params = {"style": {"dpi": 60}, "max_nodes": 80, "max_edges": 100}
        plot_attribution_graph({"graph": source}, params, Output(tmp_path, files, {"stage": "test"}))
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_the_figure_and_the_export_do_without_torch() -> None:
    modules = (
        "circuitflow.plots.attribution_graph, circuitflow.graphs.exporting, circuitflow.graphs.converting"
    )
    code = f"import sys, {modules}\nassert not {{'torch', 'transformers', 'zarr'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Stages and figures of experiments on attribution graphs, run one after the other on a toy; configuration."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pydantic import ValidationError

from circuitflow.config_graph_experiments import (
    ChangeSection,
    InterventionSection,
    InterventionsSection,
    MotifsSection,
    SupernodesSection,
)
from circuitflow.dictionaries.family import save_family
from circuitflow.errors import UserError
from circuitflow.graphs.agreement import agreement, fit
from circuitflow.graphs.building import build_graph
from circuitflow.graphs.graph import Graph
from circuitflow.graphs.heads import attribute_heads
from circuitflow.graphs.intervening import Held, Mode
from circuitflow.graphs.interventions import check_modes, intervene_on_graph, mode_of
from circuitflow.graphs.motifs import find_motifs
from circuitflow.graphs.supernodes import group_features
from circuitflow.jobs import Output
from circuitflow.plots.graph_heads import draw as draw_heads
from circuitflow.plots.graph_heads import plot_graph_heads
from circuitflow.plots.graph_interventions import chosen, draw, few_ticks, plot_graph_interventions
from circuitflow.plots.graph_motifs import draw as draw_motifs
from circuitflow.plots.graph_motifs import plot_graph_motifs
from circuitflow.plots.graph_supernodes import plot_graph_supernodes
from circuitflow.plots.scales import decade, log_axis
from circuitflow.plots.style import Style, drawing, text_width
from circuitflow.store.tables import read_provenance, read_table
from tests.fixtures.activation_store import write_store
from tests.fixtures.graph_examples import random_family

COMPUTE = {"threads": 1, "device": "cpu", "deterministic": True}
PLACE = {"dtype": "float32", "compute": COMPUTE}
SHARED = {"node_share": 0.9, "edge_share": 0.98, **PLACE}
PROMPTS = {"short": [8, 9, 10, 5], "long": [8, 12, 10, 5, 7], "third": [8, 9, 10, 7]}


@pytest.fixture(scope="module")
def world(tmp_path_factory, toy_manifest, toy_lm):
    """A toy with random transcoders, graphs of three prompts, and a corpus with activations."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("experiments")
    lm = toy_lm()
    family = random_family(lm)
    save_family(folder, family)
    for name, tokens in PROMPTS.items():
        build_graph(lm, family, tokens).save(folder / f"{name}.safetensors")
    tokens = np.random.default_rng(0).integers(3, 40, (6, 8)).astype(np.int32)
    x = {
        f"mlp_in.{layer}": torch.randn(48, 32, generator=torch.Generator().manual_seed(layer)).half().numpy()
        for layer in range(lm.n_layers)
    }
    return {
        "folder": folder,
        "model": toy_manifest(),
        "dictionaries": [folder / f"member_{layer}.safetensors" for layer in range(lm.n_layers)],
        "graph": folder / "short.safetensors",
        "corpus": write_store(folder, "corpus", {"tokens": tokens, "documents": tokens}, [], 2),
        "activations": write_store(folder, "activations", x, [], 16, 8),
    }


def _run(stage, inputs, params, folder: Path, *names: str) -> dict[str, Path]:
    files = {name: folder / f"{stage.__name__}.{name}" for name in names}
    stage(inputs, params, Output(folder, files, {"stage": stage.__name__}))
    return files


def _grouped(world, folder, **more):
    params = SupernodesSection(similarity=0.2, **more).model_dump(exclude={"prompts", "drawn"}) | SHARED
    return _run(group_features, world, params, folder, "supernodes", "nodes", "edges")


def _drawn(stage, inputs, folder, **params):
    files = _run(stage, inputs, {"style": {"dpi": 60}, **params}, folder, "png", "svg")
    assert all(path.stat().st_size > 2000 for path in files.values())
    again = {name: path.read_bytes() for name, path in files.items()}
    _run(stage, inputs, {"style": {"dpi": 60}, **params}, folder, "png", "svg")
    assert again == {name: path.read_bytes() for name, path in files.items()}


def test_supernodes_interventions_and_their_figures(world, tmp_path):
    graph = Graph.load(world["graph"])
    ids = graph.node_ids()[: len(graph.features)]
    files = _grouped(world, tmp_path, by_hand={"mine": ids[:2]})
    said = json.loads(files["supernodes"].read_text())
    assert said["supernodes"]["mine"] == ids[:2]
    assert said["kinds"]["mine"] == "by hand"
    assert "group-1" in said["supernodes"]
    members = [member for these in said["supernodes"].values() for member in these]
    assert len(members) == len(set(members))
    nodes, edges = read_table(files["nodes"]), read_table(files["edges"])
    assert set(nodes["node"]) >= set(said["kept"])
    assert set(edges["source"]) | set(edges["target"]) <= set(nodes["supernode"])
    assert read_provenance(files["nodes"])["tokens"] == list(graph.tokens)
    wanted = [
        {"name": "off", "changes": [{"nodes": ["mine"], "operation": "remove", "value": None}]},
        {
            "name": "twice",
            "changes": [
                {"nodes": [ids[0]], "operation": "scale", "value": 2.0},
                {"nodes": ["1_3_2"], "operation": "set", "value": 1.5},
            ],
        },
    ]
    section = InterventionsSection(each=3, groups=1, bootstrap=50)
    params = section.model_dump(exclude={"wanted"}) | PLACE | {"wanted": wanted}
    tables = _run(
        intervene_on_graph, world | {"supernodes": files["supernodes"]}, params, tmp_path,
        "interventions", "effects", "agreement",
    )  # fmt: skip
    shown, effects, fits = (read_table(tables[name]) for name in ("interventions", "effects", "agreement"))
    assert list(dict.fromkeys(shown["intervention"]))[:3] == ["off", "twice", "group-1"]
    assert set(shown["mode"]) == {"direct", "frozen", "free"}
    assert set(shown["up_to"][shown["mode"] == "direct"]) == {3}
    direct = (effects["mode"] == "direct") & np.isfinite(effects["predicted"].astype(float))
    np.testing.assert_allclose(effects["measured"][direct], effects["predicted"][direct], atol=2e-4)
    assert np.abs(effects["measured"][direct]).max() > 0.01
    exact = fits["mode"] == "direct"
    np.testing.assert_allclose(fits["pearson"][exact], 1, atol=1e-3)
    np.testing.assert_allclose(fits["slope"][exact], 1, atol=1e-3)
    held = (effects["intervention"] == "off") & np.isin(effects["node"], ids[:2])
    assert not held.any()
    for name in ("probability_before", "probability_after"):
        one = (shown["intervention"] == "off") & (shown["mode"] == "free")
        assert 0 < shown[name][one].sum() <= 1 + 1e-6
    _drawn(plot_graph_interventions, tables, tmp_path)
    _drawn(plot_graph_supernodes, files, tmp_path, max_nodes=8)


def test_an_intervention_and_a_supernode_of_one_name_stay_apart(world, tmp_path):
    ids = Graph.load(world["graph"]).node_ids()
    files = _grouped(world, tmp_path, by_hand={"mine": ids[:2]}, automatic=False)
    wanted = [{"name": "mine", "changes": [{"nodes": ["mine"], "operation": "scale", "value": 2.0}]}]
    modes = [{"name": "direct", "attention": "frozen", "norms": "frozen", "up_to": "all"}]
    section = InterventionsSection(each=0, groups=1, bootstrap=50).model_dump()
    tables = _run(
        intervene_on_graph, world | {"supernodes": files["supernodes"]},
        section | PLACE | {"wanted": wanted, "modes": modes}, tmp_path, "interventions", "effects", "agreement",
    )  # fmt: skip
    shown, effects, fits = (read_table(tables[name]) for name in ("interventions", "effects", "agreement"))
    assert chosen(shown, 4) == [("by hand", "mine"), ("supernode", "mine")]
    whole = (fits["kind"] == "all") & (fits["target"] == "logit")
    assert fits["interventions"][whole].tolist() == [2]
    assert np.isfinite(fits["slope_low"][whole]).all()
    with drawing(Style()):
        figure = draw(shown, effects, fits, "a prompt", Style())
    titles = [axes.get_title(loc="left").splitlines() for axes in figure.axes[:2]]
    assert titles == [["mine", "scale 2: mine (2 held)"], ["mine", "remove (2 held)"]]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(set(labels)) == len(labels)


def test_a_difference_of_logits_has_heads_and_measured_effects(world, tmp_path, toy_lm):
    lm, graph = toy_lm(), Graph.load(world["graph"])
    words, ids = graph.logit_tokens[:2], graph.logits[:2].tolist()
    difference = {"name": "difference", "tokens": {words[0]: 1.0, words[1]: -1.0}}
    only = build_graph(lm, random_family(lm), PROMPTS["short"], targets=[difference])
    assert only.facts["directions"] == {"0": {str(ids[0]): 1.0, str(ids[1]): -1.0}}
    only.save(tmp_path / "only.safetensors")
    inputs = world | {"graph": tmp_path / "only.safetensors"}
    files = _run(attribute_heads, inputs, {"edges": 400, "batch": 50, **SHARED}, tmp_path, "heads")
    heads = read_table(files["heads"])
    assert "L_0" in set(heads["target"])
    supernodes = _grouped(inputs, tmp_path)["supernodes"]
    section = InterventionsSection(each=6, groups=0, bootstrap=50).model_dump()
    tables = _run(
        intervene_on_graph, inputs | {"supernodes": supernodes}, section | PLACE, tmp_path,
        "interventions", "effects", "agreement",
    )  # fmt: skip
    shown, effects, fits = (read_table(tables[name]) for name in ("interventions", "effects", "agreement"))
    direct = (effects["mode"] == "direct") & (effects["target"] == "logit")
    assert direct.sum() == 6
    np.testing.assert_allclose(effects["measured"][direct], effects["predicted"][direct], atol=2e-4)
    assert np.abs(effects["measured"][direct]).max() > 0.01
    assert np.isfinite(fits["pearson"][fits["target"] == "logit"]).all()
    assert set(ids) <= set(shown["token"])


def test_heads_and_motifs_and_their_figures(world, tmp_path):
    files = _run(attribute_heads, world, {"edges": 12, "batch": 5, **SHARED}, tmp_path, "heads")
    heads = read_table(files["heads"])
    for source, target in set(zip(heads["source"], heads["target"], strict=True)):
        mine = (heads["source"] == source) & (heads["target"] == target)
        assert heads["last"][mine].sum() == pytest.approx(heads["weight"][mine][0], rel=1e-3)
    _drawn(plot_graph_heads, files, tmp_path)
    graphs = [world["folder"] / f"{name}.safetensors" for name in PROMPTS]
    params = MotifsSection(shuffles=20, edges=60).model_dump() | {"names": list(PROMPTS), **SHARED}
    tables = _run(find_motifs, {"graphs": graphs}, params, tmp_path, "motifs", "totals")
    motifs = read_table(tables["motifs"])
    assert (motifs["graphs"] >= 2).all()
    assert (motifs["q"] >= motifs["p"]).all()
    _drawn(plot_graph_motifs, tables, tmp_path)


def test_ticks_of_a_narrow_axis_do_not_meet():
    size = 9.0
    for low, high in ((0.0238, 0.0305), (0.02, 0.9), (1e-6, 0.9), (0.0261, 0.02611)):
        with drawing(Style()):
            axes = Figure().subplots()
            log_axis(axes, "x", [low, high])
            few_ticks(axes, 1.7, size)
        ends = np.log(axes.get_xlim())
        ticks = axes.get_xticks()
        middle = 1.7 * (np.log(ticks) - ends[0]) / (ends[1] - ends[0])
        half = [text_width(decade(tick), size) / 2 for tick in ticks]
        assert 1 <= len(ticks) <= 8
        assert (np.diff(middle) > np.add(half[1:], half[:-1])).all()


def test_parts_of_edges_are_named_in_the_bars_and_in_a_legend():
    lines = [(-1, -1, 0.2), (1, 0, 0.5), (0, 3, 0.3)]
    table = {
        "source": np.array(["0_1_1"] * 3, object), "target": np.array(["1_2_2"] * 3, object),
        "layer": np.array([line[0] for line in lines]), "head": np.array([line[1] for line in lines]),
        "last": np.array([line[2] for line in lines]), "weight": np.ones(3), "flow": np.ones(3),
    }  # fmt: skip
    with drawing(Style()):
        axes = draw_heads(table, {"n_layers": 2, "heads": 4, "edges": 1}, Style()).axes[1]
    assert [text.get_text() for text in axes.texts] == ["no head", "L1H0", "L0H3"]
    legend = axes.get_legend()
    named = {text.get_text(): patch.get_facecolor() for text, patch in zip(
        legend.get_texts(), legend.get_patches(), strict=True
    )}  # fmt: skip
    assert list(named) == ["no head", "its largest head", "second", "third", "other heads"]
    bars = [bar.get_facecolor() for bar in axes.patches]
    assert bars == [named[name] for name in list(named)[:3]]


def test_the_axes_of_motifs_count_whole_graphs_where_nothing_recurs():
    nothing = {"chain": [], "length": [], "graphs": [], "expected": [], "recurring": []}
    motifs = {name: np.array(column) for name, column in nothing.items()}
    totals = {
        "length": np.array([2]), "graphs": np.array([2]), "observed": np.array([0]),
        "expected": np.zeros(1), "low": np.zeros(1), "high": np.zeros(1),
    }  # fmt: skip
    with drawing(Style()):
        figure = draw_motifs(motifs, totals, 0.05, Style())
        figure.draw_without_rendering()
    chains, many = figure.axes
    assert [text.get_text() for text in chains.texts] == ["no chain is in 2 graphs or more"]
    low, high = many.get_xlim()
    assert [tick for tick in many.get_xticks() if low <= tick <= high] == [2]
    low, high = many.get_ylim()
    labels = [many.yaxis.get_major_formatter()(tick, 0) for tick in many.get_yticks() if low <= tick <= high]
    assert labels == ["0", "1"]


def test_interventions_that_change_nothing_are_refused(world, tmp_path):
    files = _grouped(world, tmp_path)
    idle = next(f"0_{i}" for i in range(24) if i not in Graph.load(world["graph"]).features[:, 2])
    for change, said in (
        ({"nodes": [idle], "operation": "remove", "value": None}, "changes nothing"),
        ({"nodes": [idle], "operation": "set", "value": 1.0}, f'for example "{idle}_3"'),
        ({"nodes": ["Paris"], "operation": "remove", "value": None}, "neither an id"),
    ):
        section = InterventionsSection(each=0, groups=0)
        params = section.model_dump() | SHARED | {"wanted": [{"name": "x", "changes": [change]}]}
        with pytest.raises(UserError, match=said):
            _run(
                intervene_on_graph, world | {"supernodes": files["supernodes"]}, params, tmp_path,
                "interventions", "effects", "agreement",
            )  # fmt: skip


def test_regression_by_hand():
    x, y = np.array([0.0, 1, 2, 3]), np.array([1.0, 3, 5, 9])
    sums = np.array([4, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
    r, slope = fit(sums)
    assert float(slope) == pytest.approx(np.polyfit(x, y, 1)[0])
    assert float(r) == pytest.approx(np.corrcoef(x, y)[0, 1])
    effects = {
        "intervention": ["a"] * 4 + ["b"] * 4, "kind": ["feature"] * 4 + ["supernode"] * 4,
        "mode": ["m"] * 8, "target": ["logit"] * 8, "measured": [*y, *y], "predicted": [*x, *x[:3], np.nan],
    }  # fmt: skip
    found = agreement(effects, 100, 0)
    endless = {**effects, "measured": [*y, *y[:3], np.inf], "predicted": [*x, *x]}
    assert agreement(endless, 100, 0)["slope"] == pytest.approx(found["slope"], nan_ok=True)
    assert found["target"] == ["logit"] * 3 + ["feature"] * 3
    assert found["kind"] == ["all", "feature", "supernode"] * 2
    assert found["n"] == [7, 4, 3, 0, 0, 0]
    assert found["slope_low"][0] <= found["slope"][0] <= found["slope_high"][0]
    assert found["slope"][1] == pytest.approx(float(slope))
    assert np.isnan(found["slope_low"][1])  # one intervention: nothing to resample
    assert np.isnan(found["pearson"][3])


def test_modes_by_name():
    held = [Held(2, 0, 0, 1.0), Held(5, 1, 0, 1.0)]
    said = {"attention": "frozen", "norms": "free"}
    assert mode_of(said | {"up_to": None}, held, 12) == Mode(True, False, -1)
    assert [mode_of(said | {"up_to": last}, held, 12).up_to for last in ("all", "touched", 3)] == [11, 5, 3]
    assert mode_of({"attention": "free", "norms": "frozen", "up_to": None}, held, 12) == Mode(False, True, -1)


def test_layers_beyond_the_model_are_refused_before_it_runs(world, tmp_path):
    modes = [{"name": "deep", "attention": "frozen", "norms": "free", "up_to": 4}]
    check_modes(modes, 5)
    section = InterventionsSection().model_dump() | PLACE | {"modes": modes}
    inputs = {
        "graph": world["graph"],
        "model": tmp_path / "none",
        "dictionaries": [],
        "supernodes": tmp_path / "none",
    }
    with pytest.raises(UserError, match=r"modes\.0\.up_to is 4, but the model has 4 layers"):
        _run(intervene_on_graph, inputs, section, tmp_path, "interventions", "effects", "agreement")


def test_sections_refuse_what_cannot_be():
    for value, operation in ((None, "scale"), (None, "set"), (1.0, "remove")):
        with pytest.raises(ValidationError, match=f"operation {operation}"):
            ChangeSection(nodes=["3_4"], operation=operation, value=value)
    for name in ("3_4", "3_4_5", "E_0_1", "group-2", "errors_3"):
        with pytest.raises(ValidationError, match="choose another"):
            SupernodesSection(by_hand={name: ["3_4"]})
    assert SupernodesSection(by_hand={"group": ["3_4"]}).by_hand == {"group": ["3_4"]}
    change = ChangeSection(nodes=["3_4"])
    with pytest.raises(ValidationError, match="different names"):
        InterventionsSection(wanted=[InterventionSection(name="a", changes=[change])] * 2)
    assert ChangeSection(nodes=["3_4"], operation="scale", value=2.0).value == 2

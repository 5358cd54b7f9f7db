"""Transcoders, attribution graphs and a crosscoder: once from end to end, and what edits re-run."""

import json
from pathlib import Path

import numpy as np
import pytest

from circuitflow.graphs.graph import Graph
from circuitflow.store.tables import read_table
from tests.workflow.conftest import GRAPHS, Clone

FOLDER = Path("results/tiny/graphs/transcoders")
PROMPTS = ("plural", "singular")
LAYERS = 4
OF_PRUNING = {
    "prune_graph": 2,
    "describe_graph_features": 1,
    "export_graph": 2,
    "plot_attribution_graph": 2,
    "group_features": 2,
    "intervene_on_graph": 2,
    "attribute_heads": 2,
    "find_motifs": 1,
    "plot_graph_heads": 2,
    "plot_graph_interventions": 2,
    "plot_graph_motifs": 1,
    "plot_graph_supernodes": 2,
}
OF_GRAPHS = {"build_attribution_graph": 2, "virtual_weights": 2, **OF_PRUNING}
OF_TRANSCODERS = {"measure_transcoders": 1, "plot_transcoder_quality": 1, "plot_transcoder_training": 1}


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_graph_accounts_for_every_feature(graphed: Clone, prompt: str) -> None:
    graph = Graph.load(graphed.root / FOLDER / prompt / "graph.safetensors")
    summary = json.loads((graphed.root / FOLDER / prompt / "summary.json").read_text(encoding="utf-8"))
    assert len(graph.tokens) == 5
    assert len(graph.features)
    assert summary["largest_deviation"] < 1e-4
    assert 0 < summary["replacement_score"] < 1
    assert len(graph.logits) == (10 if prompt == "plural" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_table_and_figure_is_there(graphed: Clone, prompt: str) -> None:
    folder = graphed.root / FOLDER / prompt
    for name in (
        "nodes",
        "edges",
        "virtual_weights",
        "virtual_features",
        "heads",
        "interventions",
        "supernodes",
    ):
        assert len(next(iter(read_table(folder / f"{name}.parquet").values()))), name
    figures = {"attribution_graph", "heads", "interventions", "supernodes"}
    assert {path.stem for path in (folder / "figures").glob("*.png")} == figures
    assert {path.stem for path in (folder / "figures").glob("*.svg")} == figures
    exported = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    ids = {node["node_id"] for node in exported["nodes"]}
    assert {end for link in exported["links"] for end in (link["source"], link["target"])} <= ids


@pytest.mark.slow
def test_predictions_are_exact_where_the_model_is_held(graphed: Clone) -> None:
    """With attention and norms frozen, and no MLP that responds, the graph's edges are the effects."""
    table = read_table(graphed.root / FOLDER / "plural" / "interventions.agreement.parquet")
    direct = (table["mode"] == "direct") & np.isfinite(table["pearson"])
    assert direct.any()
    assert table["pearson"][direct] == pytest.approx(1, abs=1e-4)
    assert table["slope"][direct] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_finished_run_of_graphs_has_nothing_to_do(graphed: Clone) -> None:
    assert graphed.planned("--", *GRAPHS) == {}


EDITS = {
    "the share of nodes that pruning keeps": (
        "  features: {features: 20",
        "  node_share: 0.7\n  features: {features: 20",
        OF_PRUNING,
    ),
    "one prompt": (
        'text: "The doctors near the car"',
        'text: "The nurses near the car"',
        # What is described and drawn is told of both prompts together.
        OF_GRAPHS
        | dict.fromkeys(
            (
                "build_attribution_graph",
                "prune_graph",
                "virtual_weights",
                "group_features",
                "intervene_on_graph",
                "attribute_heads",
                "plot_graph_heads",
                "plot_graph_interventions",
                "plot_graph_supernodes",
            ),
            1,
        ),
    ),
    "virtual weights that are listed": ("strongest: 10", "strongest: 12", {"virtual_weights": 2}),
    "features removed one at a time": (
        "each: 6",
        "each: 5",
        {"intervene_on_graph": 2, "plot_graph_interventions": 2},
    ),
    "a setting of the transcoders": (
        "  skip: true\n",
        "  skip: false\n",
        {"train_transcoder": LAYERS} | OF_TRANSCODERS | OF_GRAPHS,
    ),
    "the crosscoder's sites": (
        "sites: [resid.0, resid.1, resid.3]",
        "sites: [resid.0, resid.3]",
        {
            "cache_crosscoder_activations": 1,
            "train_crosscoder": 1,
            "measure_crosscoder": 1,
            "locate_features": 1,
            "plot_crosscoder_layers": 1,
            "plot_crosscoder_quality": 1,
            "plot_crosscoder_training": 1,
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_re_runs_what_it_concerns(graphed: Clone, name: str) -> None:
    old, new, expected = EDITS[name]
    with graphed.edited("run.yaml", old, new):
        assert graphed.planned("--", *GRAPHS) == expected

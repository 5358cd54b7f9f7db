"""The whole workflow over every kind of site of a small Gemma 2, with dictionaries as Gemma Scope publishes them."""

import json
from pathlib import Path

import numpy as np
import pytest

from circuitflow.store.tables import read_provenance, read_table
from tests.workflow.conftest import Clone, copy_repository

CONFIG = """
model:
  name: gemma
  source: {kind: toy, architecture: gemma2, layers: 2, d_model: 16, heads: 2, seed: 0, train_steps: 0}
compute: {threads: 1}
task:
  name: agreement
  pairs: {kind: generate, structures: [simple], train: 24, test: 12}
  confidence: {min_difference: null}
corpus:
  sources: [{kind: task, tokens: 1500}]
  block: 16
  held_out: 0.2
sites: [embed, z.1, mlp.1, resid.1]
activations: {shard_rows: 512}
dictionaries:
  name: scope
  kind: pretrained
  source: {format: gemma_scope, path: gemma-scope-2b-pt-res/layer_1/width_40/average_l0_10}
  overrides:
    embed: {kind: none}
    z.1: {source: {format: gemma_scope, path: gemma-scope-2b-pt-att/layer_1/width_40/average_l0_10}}
    mlp.1: {source: {format: gemma_scope, path: gemma-scope-2b-pt-mlp/layer_1/width_40/average_l0_10}}
measure: {blocks: 2}
scores: {positions: none, compare: [ig, exact], budget: 8, steps: 2, overlap_at: [5], bootstrap: 50}
edges: {pool: 8, exact: 2, draws: 5}
circuit: {nodes: {top: 30}, edges: {effect_share: 0.9}, prune: sink_backwards, stability: 20}
evaluation: {counts: [5, 20], random_counts: [5], random_draws: 2, pairs: 8, bootstrap: 50}
features: {top: 2, contexts: 2}
"""
WIDTH, D_DICT = 16, 40


def write_scope(root: Path, kind: str) -> None:
    """A random JumpReLU dictionary in Gemma Scope's files and folders."""
    draw = np.random.default_rng(sum(map(ord, kind)))
    rows = draw.normal(size=(D_DICT, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    folder = root / f"gemma-scope-2b-pt-{kind}" / "layer_1" / "width_40" / "average_l0_10"
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz",
        W_enc=rows.T.copy(),
        W_dec=rows,
        b_enc=np.zeros(D_DICT, np.float32),
        b_dec=np.zeros(WIDTH, np.float32),
        threshold=np.full(D_DICT, 0.05, np.float32),
    )


@pytest.mark.slow
def test_gemma_2_with_gemma_scope_runs_from_end_to_end_by_position(tmp_path: Path) -> None:
    clone: Clone = copy_repository(tmp_path / "clone")
    clone.config.write_text(CONFIG, encoding="utf-8")
    for kind in ("res", "mlp", "att"):
        write_scope(clone.root, kind)
    clone.snakemake("--", "all", "methods")
    folder = clone.root / "results/gemma/agreement/scope"
    circuit = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))
    assert {node["position"] for node in circuit["nodes"]} <= set(range(12))
    assert all("@" in node["id"] for node in circuit["nodes"])
    assert circuit["selection"]["without_path_to_metric"] == []
    for site, residual in circuit["selection"]["conservation"].items():
        assert residual["relative"] < 1e-4, site
    for down in ("z.1", "mlp.1", "resid.1", "metric"):
        table = read_table(folder / "edges" / f"{down}.parquet")
        assert len(table["weight"]), down
        assert np.isfinite(table["exact"]).any(), down
    assert read_provenance(folder / "edges" / "mlp.1.parquet")["neighbours"] == ["embed", "z.1"]
    assert (read_table(folder / "edges" / "metric.parquet")["up_site"] == "resid.1").all()
    curve = read_table(folder / "faithfulness.parquet")
    assert np.isfinite(curve["m_circuit"]).all()
    assert len(np.unique(curve["m_circuit"])) > 4
    agreement = read_table(folder / "methods" / "agreement.parquet")
    assert set(agreement["method"]) == {"ig"}
    for figure in ("circuit", "audit", "circuit_positions", "stability", "faithfulness", "methods"):
        assert (folder / "figures" / f"{figure}.png").stat().st_size > 5000
    assert clone.planned("--", "all", "methods") == {}

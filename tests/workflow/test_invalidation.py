"""The invalidation table: what each edit re-runs, and nothing else."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from circuitflow.store.objects import read_manifest
from tests.workflow.conftest import Clone

SITES = 3
FIGURES = {
    f"plot_{name}": 1
    for name in (
        "task_accuracy", "training_curves", "layer_importance", "agreement", "top_features", "faithfulness", "circuit",
        "circuit_positions", "stability", "audit",
    )
}  # fmt: skip
PAGE = {"build_report": 1}
CIRCUIT = {
    "assemble_circuit": 1,
    "audit_circuit": 1,
    "plot_audit": 1,
    "plot_circuit": 1,
    "plot_circuit_positions": 1,
    "circuit_stability": 1,
    "plot_stability": 1,
    **PAGE,
}
FAITHFULNESS = {"evaluate_circuit": 1, "plot_faithfulness": 1, **PAGE}
AFTER_EDGES = CIRCUIT | FAITHFULNESS
AFTER_RANKING = AFTER_EDGES | {
    "rank_features": 1,
    "describe_features": SITES,
    "plot_layer_importance": 1,
    "plot_agreement": 1,
    "plot_top_features": 1,
}
AFTER_POOL = AFTER_EDGES | {"score_edges": SITES, "describe_features": SITES, "plot_top_features": 1}
AFTER_SCORES = AFTER_RANKING | {"score_nodes": SITES, "score_edges": SITES}
AFTER_METHOD = AFTER_SCORES | {"cache_method_gradients": 2}
AFTER_DICTIONARIES = AFTER_SCORES | {
    "train_dictionary": SITES,
    "measure_dictionary": SITES,
    "cache_means": SITES,
    "plot_training_curves": 1,
}
AFTER_HARVEST = AFTER_DICTIONARIES | {"cache_activations": 1}
AFTER_GRADIENTS = AFTER_SCORES | {"cache_gradients": 2, "cache_means": SITES}
AFTER_PAIRS = (
    AFTER_GRADIENTS
    | AFTER_HARVEST
    | {
        "generate_pairs": 1,
        "tokenize_pairs": 1,
        "filter_pairs": 1,
        "tokenize_corpus": 1,
        "plot_task_accuracy": 1,
    }
)
ONE_DICTIONARY = AFTER_RANKING | {
    "train_dictionary": 1,
    "measure_dictionary": 1,
    "cache_means": 1,
    "score_nodes": 1,
    "score_edges": 2,
    "plot_training_curves": 1,
}

TRAINER = "circuitflow/dictionaries/trainer.py"
CONFIG_EDITS = {
    "k of one dictionary": ("k: 8\n", "k: 8\n  overrides: {resid.1: {k: 4}}\n", ONE_DICTIONARY),
    "k of every dictionary": ("k: 8\n", "k: 6\n", AFTER_DICTIONARIES),
    "number of pairs": ("train: 60, test: 12", "train: 62, test: 12", AFTER_PAIRS),
    "plot colour": (
        "features: {top: 5",
        "plots: {palette: {positive: navy}}\nfeatures: {top: 5",
        FIGURES | PAGE,
    ),
    "circuit threshold inside the pool": ("nodes: {top: 20}", "nodes: {threshold: 0.01}", AFTER_EDGES),
    "bootstrap resamples": ("bootstrap: 200", "bootstrap: 300", FAITHFULNESS),
    "corpus size": (
        "tokens: 4000",
        "tokens: 3000",
        AFTER_HARVEST | {"tokenize_corpus": 1},
    ),
    "a site added": (
        "sites: [resid.0, resid.1, resid.2]",
        "sites: [resid.0, resid.1, resid.2, resid.3]",
        AFTER_HARVEST
        | AFTER_GRADIENTS
        | dict.fromkeys(
            ("train_dictionary", "measure_dictionary", "cache_means", "score_nodes", "describe_features"),
            SITES + 1,
        )
        | {"score_edges": SITES + 1},
    ),
    "another method": ("scores: {overlap", "scores: {method: relp, overlap", AFTER_METHOD),
    "steps of a method that is not used": ("scores: {overlap", "scores: {steps: 20, overlap", PAGE),
    "pruning": ("edges: {top: 40}", "edges: {top: 40}\n  prune: sink_backwards", AFTER_EDGES),
    "resamples of the stability": (
        "edges: {top: 40}",
        "edges: {top: 40}\n  stability: 100",
        {"circuit_stability": 1, "plot_stability": 1, **PAGE},
    ),
    "draws of edges": (
        "edges: {pool: 12}",
        "edges: {pool: 12, draws: 20}",
        AFTER_EDGES | {"score_edges": SITES},
    ),
    "a faithfulness to be searched": (
        "nodes: {top: 20}",
        "nodes: {faithfulness: 0.5}",
        AFTER_EDGES | {"search_circuit": 1},
    ),
    "pool of edges": ("edges: {pool: 12}", "edges: {pool: 14}", AFTER_POOL),
    "overlap@k": (
        "overlap_at: [5, 20]",
        "overlap_at: [5, 10]",
        AFTER_RANKING,
    ),
    "means over the other split": (
        "pairs: 16",
        "pairs: 16\n  means: test",
        FAITHFULNESS | {"cache_means": SITES},
    ),
    "batch of the harvest": ("batch_blocks: 8}", "batch_blocks: 4}", AFTER_HARVEST),
    "a key that the kind does not use": ("k: 8\n", "k: 8\n  penalty: 0.3\n  prefixes: [0.5, 1.0]\n", PAGE),
    "tracking": ("measure: {blocks: 4}", "tracking: {wandb: {project: p}}\nmeasure: {blocks: 4}", {}),
    "bootstrap of the quality": (
        "measure: {blocks: 4}",
        "measure: {blocks: 4, bootstrap: 200}",
        {"measure_dictionary": SITES, **PAGE},
    ),
    "a comment in the configuration": ("# Seconds instead", "# Moments instead", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIG_EDITS)
def test_an_edit_of_the_configuration(finished: Clone, name: str) -> None:
    old, new, expected = CONFIG_EDITS[name]
    with finished.edited("run.yaml", old, new):
        assert finished.planned() == expected


CODE_EDITS = {
    "a comment in the trainer": (TRAINER, "import torch\n", "import torch  # tensors\n", {}),
    "a line in the trainer": (TRAINER, "import torch\n", "import torch\n\nUNUSED = 1\n", AFTER_DICTIONARIES),
    "a line in a reader of other libraries' files": (
        "circuitflow/dictionaries/formats/sae_lens.py",
        "import torch\n",
        "import torch\n\nUNUSED = 1\n",
        {},
    ),
    "a line in one plot": (
        "circuitflow/plots/faithfulness.py",
        "import numpy as np\n",
        "import numpy as np\n\nUNUSED = 1\n",
        {"plot_faithfulness": 1, **PAGE},
    ),
    "a line in the look of all plots": (
        "circuitflow/plots/style.py",
        "import matplotlib\n",
        "import matplotlib\n\nUNUSED = 1\n",
        FIGURES | PAGE,
    ),
    "a line in the error messages": (
        "circuitflow/errors.py",
        "import difflib\n",
        "import difflib\n\nUNUSED = 1\n",
        {},
    ),
    "a line in the configuration's code": (
        "circuitflow/config.py",
        "class Config(Section)",
        "UNUSED = 1\n\n\nclass Config(Section)",
        {},
    ),
    "a line in the edges' code": (
        "circuitflow/attribution/edges.py",
        "import torch\n",
        "import torch\n\nUNUSED = 1\n",
        {"score_edges": SITES} | AFTER_EDGES,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CODE_EDITS)
def test_an_edit_of_the_code(finished: Clone, name: str) -> None:
    file, old, new, expected = CODE_EDITS[name]
    with finished.edited(file, old, new):
        assert finished.planned() == expected


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_do(finished: Clone) -> None:
    assert "Nothing to be done" in finished.snakemake("-n").stdout
    assert finished.planned() == {}


@pytest.mark.slow
def test_touching_a_small_input_without_change_re_runs_nothing(finished: Clone) -> None:
    for name in ("results/tiny/agreement/pairs/train.jsonl", "results/tiny/corpus/manifest.json"):
        path = finished.root / name
        before = path.stat()
        os.utime(path, (time.time() + 5, time.time() + 5))
        assert finished.planned() == {}
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_a_deleted_shard_stops_the_first_reader_with_the_command_that_repairs_it(finished: Clone) -> None:
    manifest = "results/tiny/activations/manifest.json"
    store = read_manifest(finished.root / manifest).folder(finished.root / manifest)
    shard = next(path for path in sorted(store.rglob("c/1/0")) if path.is_file())
    kept, times = shard.read_bytes(), shard.stat()
    shard.unlink()
    assert finished.planned() == {}, "a dry run cannot see inside a store"
    target = "results/tiny/dictionaries/topk-8/resid.1.json"
    with finished.edited("run.yaml", "k: 8\n", "k: 7\n"):
        failed = finished.snakemake(target, check=False)
    assert failed.returncode != 0
    assert f"circuitflow verify --repair {manifest}" in failed.stderr + failed.stdout
    repaired = finished.circuitflow("verify", "--repair", manifest)
    assert repaired.returncode == 0, repaired.stderr
    assert shard.read_bytes() == kept
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    finished.snakemake()


@pytest.mark.slow
def test_going_to_other_settings_and_back_computes_nothing_again(finished: Clone) -> None:
    """The manifests, weights and tables come back bit for bit, and every expensive job says it was kept."""
    results = finished.root / "results/tiny"
    before = digests(results)
    with finished.edited("run.yaml", "k: 8\n", "k: 6\n"):
        finished.snakemake()
        assert digests(results) != before
    back = finished.snakemake()
    output = back.stdout + back.stderr
    assert digests(results) == before
    of_sites = ("train_dictionary", "measure_dictionary", "cache_means", "score_nodes", "describe_features")
    of_all = ("evaluate_circuit", "audit_circuit")
    for rule in (*of_sites, "score_edges", *of_all):
        assert f"{rule}" in output
    kept = output.count("kept from an earlier run")
    assert kept == len(of_sites) * SITES + SITES + len(of_all), output


@pytest.mark.slow
def test_an_upstream_stage_with_an_identical_result_costs_its_followers_only_their_start(
    finished: Clone,
) -> None:
    """A forced stage makes the same corpus again: the harvest and all that follows find their work kept."""
    results = finished.root / "results/tiny"
    before = digests(results)
    scores = [f"results/tiny/agreement/topk-8/scores/atp/resid.{site}.parquet" for site in range(SITES)]
    forced = finished.snakemake("--forcerun", "tokenize_corpus", "--", *scores)
    output = forced.stdout + forced.stderr
    assert digests(results) == before
    assert finished.planned() == {}, "what comes after has not changed"
    assert "cache_activations: kept from an earlier run" in output
    for site in range(SITES):
        assert f"train_dictionary topk-8 resid.{site}: kept from an earlier run" in output
        assert f"train_dictionary topk-8 resid.{site}: steps" not in output


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Digest of every artefact by path, objects left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and "objects" not in path.parts
    }

"""Model diffing: once from end to end with a second model by fine-tuning, and what edits re-run."""

import json
from pathlib import Path

import numpy as np
import pytest

from circuitflow.store.tables import read_table
from tests.workflow.conftest import Clone

FOLDER = Path("results/tiny-diffing/diffing/echoes")
COMPARISON = {"compare_models": 1, "describe_differences": 1, "plot_diffing": 1}
CROSSCODER = {"train_diffing_crosscoder": 1, **COMPARISON}
HARVEST = {"cache_second_activations": 1, "join_activations": 1, **CROSSCODER}
EDITS = {
    "when a feature counts as shared": (
        "run.yaml",
        "  rows: 20000\n",
        "  rows: 20000\n  shared: [0.4, 0.6]\n",
        COMPARISON,
    ),
    "features that are described": ("run.yaml", "  top: 8\n", "  top: 6\n", {"describe_differences": 1}),
    "the crosscoder's k": ("run.yaml", "  k: 6\n", "  k: 5\n", CROSSCODER),
    "steps of the fine-tuning": (
        "run.yaml",
        "steps: 200",
        "steps: 210",
        {"fine_tune_model": 1, **HARVEST},
    ),
    "the run's own dictionaries": ("run.yaml", "  d_dict: 128\n  k: 8\n", "  d_dict: 128\n  k: 7\n", {}),
    "a line in the fine-tuning": (
        "circuitflow/diffing/tuning.py",
        "import torch\n",
        "import torch\n\nUNUSED = 1\n",
        {"fine_tune_model": 1, **HARVEST},
    ),
    "a line in the figure": (
        "circuitflow/plots/diffing.py",
        "import numpy as np\n",
        "import numpy as np\n\nUNUSED = 1\n",
        {"plot_diffing": 1},
    ),
}


@pytest.mark.slow
def test_the_second_model_has_features_of_its_own(diffed: Clone) -> None:
    folder = diffed.root / FOLDER
    table = read_table(folder / "features.parquet")
    alive = table["class"][table["density"] > 0]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert {"shared", "tuned"} <= set(alive)
    assert summary["classes"] == {name: np.sum(alive == name) for name in ("base", "shared", "tuned")}
    described = json.loads((folder / "descriptions.json").read_text(encoding="utf-8"))["features"]
    assert {entry["class"] for entry in described} == set(alive)
    for entry in described:
        assert entry["contexts"]
        assert entry["logits"]["top"]
    for kind in ("png", "svg"):
        assert (folder / f"figures/diffing.{kind}").stat().st_size > 10_000


@pytest.mark.slow
def test_a_finished_comparison_has_nothing_to_do(diffed: Clone) -> None:
    assert diffed.planned("--", "diff") == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_re_runs_what_it_concerns(diffed: Clone, name: str) -> None:
    file, old, new, expected = EDITS[name]
    with diffed.edited(file, old, new):
        assert diffed.planned("--", "diff") == expected

"""The targets faithfulness, error_nodes, validation, compare and effects, once from end to end."""

import re
from pathlib import Path

import numpy as np
import pytest

from circuitflow.store.tables import read_provenance, read_table
from tests.workflow.conftest import EXPERIMENTS, Clone
from tests.workflow.test_invalidation import FAITHFULNESS, PAGE

SITES = 2
PAIRS = 4  # test pairs that interventions are run on
RANGES = 3  # of sites in which features are restored: each, and both
FOLDER = Path("results/tiny/agreement")
SET = FOLDER / "topk-8"
RESTORED = SET / "error_nodes/experiments.parquet"
BUDGETS = FOLDER / "compare/run/values.parquet"
CIRCUITS = SET / "faithfulness.parquet"
KNOWN = re.compile(r"(\d+) of (\d+) results are known from before")

INTERVAL = {"low", "high", "n"}
TABLES = {
    FOLDER / "confidence.parquet": {"split", "case", "quantity", "threshold", "count", "share"} | INTERVAL,
    SET / "faithfulness.parquet": {"series", "nodes", "F", "m_circuit", "m_empty", "m_full"} | INTERVAL,
    SET / "conditions.parquet": {"series", "nodes", "ablation", "start", "errors", "aggregate", "F"} | INTERVAL,
    SET / "conditions.areas.parquet": {"series", "ablation", "errors", "cpr", "cpr_low", "cmd", "cmd_high", "n"},
    SET / "composition.parquet": {"source", "nodes", "site", "kind", "count", "share", "strength_share"},
    SET / "edge_faithfulness.parquet": {"series", "source", "edges", "draw", "aggregate", "F"} | INTERVAL,
    SET / "error_nodes/components.parquet": {"site", "split", "part", "delta", "gradient", "cosine", "score", "n"},
    SET / "error_nodes/experiments.parquet": {"experiment", "what", "first", "last", "k", "F", "m"} | INTERVAL,
    SET / "error_nodes/decomposition.parquet": {"site", "data", "quantity", "value"} | INTERVAL,
    SET / "validation.parquet": {"site", "method", "kind", "pearson", "pearson_low", "slope", "slope_high", "n"},
    SET / "validation.nodes.parquet": {"site", "method", "feature", "score", "effect", "low", "high"},
    SET / "audit.parquet": {"what", "side", "stratum", "population", "measured", "exact_sum", "upper", "n"},
    SET / "audit.nodes.parquet": {"site", "feature", "inside", "stratum", "score", "exact"} | INTERVAL,
    SET / "audit.edges.parquet": {"up_site", "down_site", "inside", "stratum", "score", "exact"} | INTERVAL,
    FOLDER / "compare/comparison.parquet": {"contender", "method", "nodes", "F"} | INTERVAL,
    FOLDER / "compare/differences.parquet": {"contender", "reference", "nodes", "difference"} | INTERVAL,
    FOLDER / "compare/areas.parquet": {"contender", "cpr", "cmd", "cpr_difference", "n"},
    FOLDER / "compare/circuits.parquet": {"a", "b", "site", "nodes_a", "nodes_b", "jaccard"},
    SET / "effects.parquet": {"pair", "intervention", "token", "role", "probability", "logit", "rank", "m", "kl"},
    SET / "effects.response.parquet": {"node", "pair", "value", "multiple", "m", "n"},
}  # fmt: skip
"""Columns that every table must have."""

FIGURES = [
    *(
        SET / "figures" / name
        for name in ("faithfulness_conditions", "composition", "outliers", "confidence")
    ),
    *(SET / "figures" / name for name in ("edge_faithfulness", "validation", "audit", "effects")),
    *(
        SET / "figures" / f"error_{name}"
        for name in (
            "components",
            "ablation",
            "restoration",
            "heatmap",
            "windows",
            "baselines",
            "decomposition",
        )
    ),
    FOLDER / "compare/figures/budgets",
]


@pytest.mark.slow
def test_every_experiment_writes_its_tables_and_figures(experimented: Clone) -> None:
    for file, columns in TABLES.items():
        table = read_table(experimented.root / file)
        assert columns <= set(table), f"{file} lacks {sorted(columns - set(table))}"
        assert len(next(iter(table.values()))), f"{file} has no rows"
        assert read_provenance(experimented.root / file)["conventions"], file
    for figure in FIGURES:
        for ending, least in ((".png", 5000), (".svg", 3000)):
            path = (experimented.root / figure).with_name(figure.name + ending)
            assert path.stat().st_size > least, path
    for split in ("train", "test"):
        assert (experimented.root / FOLDER / f"confident/{split}.jsonl").stat().st_size
    assert experimented.planned("--", "all", *EXPERIMENTS) == {}


@pytest.mark.slow
def test_what_experiments_must_agree_on(experimented: Clone) -> None:
    """The whole model is 1 and the empty circuit 0 in each of them, on the same prompts."""
    main = read_table(experimented.root / SET / "faithfulness.parquet")
    full, nothing = main["m_full"][0], main["m_empty"][0]
    assert main["n"][0] == PAIRS
    for file in (
        SET / "edge_faithfulness.parquet",
        SET / "error_nodes/experiments.parquet",
        FOLDER / "compare/comparison.parquet",
    ):
        table = read_table(experimented.root / file)
        run = table["contender"] == "run" if "contender" in table else np.ones(len(table["F"]), bool)
        assert table["m_full"][run] == pytest.approx(full, rel=1e-5), file
        assert set(table["n"]) == {PAIRS}
    conditions = read_table(experimented.root / SET / "conditions.parquet")
    assert {"mean", "zero"} == set(conditions["ablation"])
    assert {"scored", "removed", "none"} == set(conditions["errors"])
    whole = (conditions["series"] == "circuit") & (conditions["errors"] == "scored")
    whole &= conditions["source"] == "all"
    assert conditions["F"][whole] == pytest.approx(1, abs=1e-3)
    compared = read_table(experimented.root / FOLDER / "compare/comparison.parquet")
    same = compared["contender"] == "run"
    assert compared["m_empty"][same] == pytest.approx(nothing, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "target", "log", "evaluated"),
    [
        ("restore_top: [1, 3]", "restore_top: [1, 2, 3]", RESTORED, "ablate_error_nodes", RANGES),
        ("counts: [5, 20]", "counts: [5, 7, 20]", BUDGETS, "compare/evaluate_budget.run", 1),
        ("counts: [2, 10]", "counts: [2, 7, 10]", CIRCUITS, "evaluate_circuit", 2),
    ],
    ids=["restored features", "budgets", "circuits and what is left without them"],
)
def test_one_more_of_a_list_evaluates_only_what_is_new(
    experimented: Clone, old: str, new: str, target: Path, log: str, evaluated: int
) -> None:
    file, said = experimented.root / target, experimented.root / "logs/tiny/agreement" / f"{log}.log"
    before = read_table(file)
    with experimented.edited("run.yaml", old, new):
        experimented.snakemake("--", str(target))
        known, wanted = map(int, KNOWN.findall(said.read_text(encoding="utf-8"))[-1])
        assert len(next(iter(read_table(file).values()))) > len(next(iter(before.values())))
    assert wanted - known == evaluated
    again = experimented.snakemake("--", str(target))
    assert "kept from an earlier run" in again.stdout + again.stderr
    assert experimented.planned("--", "all", *EXPERIMENTS) == {}, "the tables are as they were"


# The page shows the configuration, so it is written again after every edit of that.
CONDITIONS = {"evaluate_conditions": 1, "plot_faithfulness_conditions": 1}
ABLATED_ERRORS = {
    "ablate_error_nodes": 1,
    **{f"plot_error_{name}": 1 for name in ("ablation", "restoration", "heatmap", "windows", "baselines")},
}
AUDIT = {"audit_circuit": 1, "plot_audit": 1, "plot_circuit": 1, "plot_circuit_positions": 1}
CONTENDERS = 2
OF_BUDGETS = {"evaluate_budget": CONTENDERS, "compare_budgets": 1, "plot_budgets": 1}
EFFECTS = {"measure_effects": 1, "plot_effects": 1}
EXPERIMENT_EDITS = {
    "another ablation": (
        "run.yaml",
        "further_ablations: [zero]",
        "further_ablations: [zero, patched]",
        CONDITIONS,
    ),
    "another number of restored features": (
        "run.yaml",
        "restore_top: [1, 3]",
        "restore_top: [1, 2, 3]",
        ABLATED_ERRORS,
    ),
    "the penalty of the prediction of errors": (
        "run.yaml",
        "ridge: 0.001",
        "ridge: 0.01",
        {"decompose_errors": 1, "plot_error_decomposition": 1},
    ),
    "nodes of the audit": ("run.yaml", "audit: {nodes: 12", "audit: {nodes: 14", AUDIT),
    "another budget": ("run.yaml", "counts: [5, 20]", "counts: [5, 20, 40]", OF_BUDGETS),
    # Snakemake itself compares values without their names.
    "two values of one rule exchanged": ("run.yaml", "pairs: 4, tokens: 3", "pairs: 3, tokens: 4", EFFECTS),
    "features with a response curve": ("run.yaml", "effects: {top: 10", "effects: {top: 7", EFFECTS),
    "a line in the engine that replaces nodes": (
        "circuitflow/circuits/ablation.py",
        "import torch\n",
        "import torch\n\nUNUSED = 1\n",
        FAITHFULNESS
        | CONDITIONS
        | ABLATED_ERRORS
        | OF_BUDGETS
        | EFFECTS
        | {"plot_outliers": 1, "evaluate_edges": 1, "plot_edge_faithfulness": 1},
    ),
    "a line in the figure of the audit": (
        "circuitflow/plots/audit.py",
        "import numpy as np\n",
        "import numpy as np\n\nUNUSED = 1\n",
        {"plot_audit": 1, "plot_circuit": 1, "plot_circuit_positions": 1},  # which quote it
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENT_EDITS)
def test_an_edit_that_concerns_experiments(experimented: Clone, name: str) -> None:
    file, old, new, expected = EXPERIMENT_EDITS[name]
    with experimented.edited(file, old, new):
        assert experimented.planned("--", "all", *EXPERIMENTS) == expected | PAGE

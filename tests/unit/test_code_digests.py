"""Digests of code: cosmetic edits keep them, others change them, and closures stay small."""

import subprocess
import sys
from pathlib import Path

import pytest

from circuitflow import code_digests
from circuitflow.code_digests import CodeReader
from circuitflow.provenance import canonical_json

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "workflow_scripts").glob("*.py"))
MODULES = 45
"""Files that a stage may import, packages' empty ones included."""

MORE = {
    # Evaluations run the model (7 files) with dictionaries in it (8), on cached activations (9 of data and
    # attribution), with the engine that replaces nodes (7) and the store with its ledger (7); 10 are packages' own
    # or put no number into a result.
    "ablate_error_nodes": (54, "and the planning of experiments on error nodes"),
    "evaluate_budget": (51, "and the circuit that it writes"),
    "evaluate_circuit": (59, "and conditions, neurons in place of features, and three tables"),
    "evaluate_edges": (59, "and the passes of edges: paths, ends and pullback"),
    "measure_effects": (49, "and the circuit that it reads"),
    "search_circuit": (48, "and the order of the nodes"),
    "build_attribution_graph": (46, "the model, its dictionaries, and what makes a graph of them"),
    "train_dictionary": (52, "and what trains dictionaries of several sites: one trainer serves both"),
    "train_transcoder": (53, "the same, and its memory estimate"),
    "train_cross_layer": (53, "the same"),
    "train_crosscoder": (53, "the same"),
    "audit_circuit": (54, "nodes patched as patch_nodes does and edges as score_edges does, on the model"),
}
"""Stages that need more, how many, and what for."""

MODEL_AND_STORE = {"data", "models", "store"}
KNOWN = {
    "dictionaries": MODEL_AND_STORE | {"dictionaries", "formats"},
    "attribution": MODEL_AND_STORE | {"dictionaries", "attribution"},
    "circuits": MODEL_AND_STORE | {"dictionaries", "attribution", "circuits", "features"},
    "error_nodes": MODEL_AND_STORE | {"dictionaries", "attribution", "circuits", "error_nodes"},
}
"""Folders that a stage may import from, by the folder of its function: evaluation knows scores, which know training."""

CLI_ONLY = {"config.py", "config_checks.py", "cli.py", "locking.py", "watching.py"}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package with one script that imports one of its two modules."""
    package = tmp_path / "circuitflow"
    (package / "part").mkdir(parents=True)
    for name in ("__init__.py", "part/__init__.py", "errors.py"):
        (package / name).write_text("")
    (package / "part" / "used.py").write_text('"""What it does."""\n\nX = 1  # one\n')
    (package / "part" / "lazy.py").write_text("Y = 2\n")
    (package / "part" / "unused.py").write_text("Z = 3\n")
    monkeypatch.setattr(code_digests, "PACKAGE", package)
    path = tmp_path / "script.py"
    path.write_text(
        "from circuitflow.errors import *\nfrom circuitflow.part import used\n\n\n"
        "def f():\n    from circuitflow.part.lazy import Y\n    return Y\n"
    )
    return path


def digest_after(script: Path, file: str, text: str) -> str:
    path = script.parent / "circuitflow" / file
    path.write_text(text)
    return CodeReader().digest(script)


@pytest.mark.parametrize(
    ("file", "text", "same"),
    [
        ("part/used.py", '"""Something else."""\n\n# a comment\nX = 1\n', True),
        ("part/used.py", '"""What it does."""\n\nX = 2\n', False),
        ("part/lazy.py", "Y = 3\n", False),
        ("part/unused.py", "Z = 4\n", True),
        ("part/__init__.py", "W = 1\n", False),
        ("errors.py", "class UserError(Exception): ...\n", True),
    ],
)
def test_what_changes_the_digest(script: Path, file: str, text: str, same: bool) -> None:
    before = CodeReader().digest(script)
    assert (digest_after(script, file, text) == before) is same


def test_a_remembered_file_is_not_parsed_again(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = script.parent / ".snakemake" / "code.json"
    first = CodeReader(memory)
    digest = first.digest(script)
    first.remember()
    (script.parent / "circuitflow/part/used.py").write_text("X = 2\n")
    second = CodeReader(memory)
    assert second.digest(script) == CodeReader().digest(script) != digest
    second.remember()

    def parse(source: bytes, path: Path) -> None:
        raise AssertionError(f"{path} was parsed again")

    monkeypatch.setattr(code_digests, "_parse", parse)
    assert CodeReader(memory).digest(script) == second.digest(script)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": 1}', '{"key": [1, 2, 3]}'])
def test_a_damaged_memory_costs_only_time(script: Path, text: str) -> None:
    memory = script.parent / "code.json"
    memory.write_text(text)
    reader = CodeReader(memory)
    assert reader.digest(script) == CodeReader().digest(script)
    reader.remember()
    assert CodeReader(memory).digest(script) == reader.digest(script)


def closure_of(stage: str) -> dict[str, str]:
    """Path within the library → its folder, of everything that a stage imports; packages' own files left out."""
    package = ROOT / "circuitflow"
    files = CodeReader().closure(ROOT / "workflow_scripts" / f"{stage}.py")
    inside = (file.relative_to(package) for file in files if file.is_relative_to(package))
    return {str(file): file.parent.name for file in inside if file.name != "__init__.py"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_stage_closures_stay_small(path: Path) -> None:
    closure = CodeReader().closure(path)
    names = {file.name for file in closure}
    assert not names & CLI_ONLY, f"{path.name} imports {names & CLI_ONLY}"
    most, _ = MORE.get(path.stem, (MODULES, ""))
    assert len(closure) <= most
    folders = {file.parent.name for file in closure}
    if path.stem.startswith("plot_"):
        assert not folders & {"models", "dictionaries", "attribution"} - {"models"}
        assert not names & {"running.py", "loading.py", "sources.py"}


def test_bounds_are_no_wider_than_what_is_there() -> None:
    scripts = {path.stem: path for path in SCRIPTS}
    for stage, (most, _) in MORE.items():
        size = len(CodeReader().closure(scripts[stage]))
        assert size > MODULES, f"{stage} needs no bound of its own"
        assert most - size <= 2, f"{stage} has {size} files; lower its bound"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_stage_imports_nothing_that_comes_after_it(path: Path) -> None:
    """Training does not know scores, scores know no circuit, and nothing but figures and the page knows figures."""
    closure = closure_of(path.stem)
    folders = set(closure.values()) - {""}
    if path.stem.startswith(("plot_", "build_")):
        assert "error_nodes" not in folders
        return
    assert not folders & {"plots", "report"}
    own = next(iter(imported_folders(path) & set(KNOWN)), None)
    if own:
        assert folders <= KNOWN[own], f"{path.name} imports {sorted(folders - KNOWN[own])}"


def imported_folders(path: Path) -> set[str]:
    """Folders that a script itself imports from."""
    words = [
        line.split()[1] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("from ")
    ]
    return {word.split(".")[1] for word in words if word.startswith("circuitflow.")}


@pytest.mark.parametrize(
    ("stages", "without"),
    [
        (["audit_circuit", "validate_scores", "assemble_circuit"], ["circuits/ablation.py", "circuits/evaluation.py"]),
        (["evaluate_circuit", "evaluate_edges", "evaluate_budget", "ablate_error_nodes"], ["circuits/assembly.py"]),
        (["evaluate_edges", "ablate_error_nodes", "audit_circuit"], ["circuits/conditions.py"]),
        (["evaluate_edges", "audit_circuit"], ["circuits/sweep.py"]),
        (["measure_components", "decompose_errors", "evaluate_circuit"], ["attribution/scores.py"]),
        (["cache_means"], ["circuits/ablation.py", "attribution/scores.py"]),
    ],
)  # fmt: skip
def test_an_edit_of_one_experiment_does_not_re_run_others(stages: list[str], without: list[str]) -> None:
    for stage in stages:
        assert not set(without) & set(closure_of(stage)), stage


def test_initial_files_are_empty() -> None:
    filled = [path for path in (ROOT / "circuitflow").rglob("__init__.py") if path.read_text().strip()]
    assert filled == []


def test_canonical_json_does_not_depend_on_order() -> None:
    assert canonical_json({"b": 1, "a": [1, 2]}) == '{"a":[1,2],"b":1}'


def test_the_workflow_starts_without_torch() -> None:
    """Every command, and every job of a cluster, reads the Snakefile and its rules first."""
    files = [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    imports = [line for line in lines if line.startswith("from circuitflow")]
    assert len(imports) > 5
    heavy = "{'torch', 'transformers', 'zarr', 'matplotlib', 'sklearn'}"
    code = "\n".join([*imports, "import sys", f"assert not {heavy} & set(sys.modules), sys.modules.keys()"])
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

"""Digests of code: cosmetic edits keep them, others change them, and closures stay small."""

from pathlib import Path

import pytest

from circuitflow import provenance

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "workflow_scripts").glob("*.py"))
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
    monkeypatch.setattr(provenance, "PACKAGE", package)
    path = tmp_path / "script.py"
    path.write_text(
        "from circuitflow.errors import *\nfrom circuitflow.part import used\n\n\n"
        "def f():\n    from circuitflow.part.lazy import Y\n    return Y\n"
    )
    return path


def digest_after(script: Path, file: str, text: str) -> str:
    path = script.parent / "circuitflow" / file
    path.write_text(text)
    provenance._bare_source.cache_clear()
    provenance._imported_files.cache_clear()
    return provenance.code_digest(script)


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
    before = provenance.code_digest(script)
    assert (digest_after(script, file, text) == before) is same


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_stage_closures_stay_small(path: Path) -> None:
    closure = provenance.import_closure(path)
    names = {file.name for file in closure}
    assert not names & CLI_ONLY, f"{path.name} imports {names & CLI_ONLY}"
    assert len(closure) <= 45
    folders = {file.parent.name for file in closure}
    if path.stem.startswith("plot_"):
        assert not folders & {"models", "dictionaries", "attribution"} - {"models"}
        assert not names & {"running.py", "loading.py", "sources.py"}


def test_initial_files_are_empty() -> None:
    filled = [path for path in (ROOT / "circuitflow").rglob("__init__.py") if path.read_text().strip()]
    assert filled == []


def test_canonical_json_does_not_depend_on_order() -> None:
    assert provenance.canonical_json({"b": 1, "a": [1, 2]}) == '{"a":[1,2],"b":1}'

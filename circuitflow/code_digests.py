"""Digests of code: which edits of the library make a stage run again."""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from circuitflow.provenance import canonical_json, digest
from circuitflow.store.files import write_text

PACKAGE = Path(__file__).parent
NEUTRAL_MODULES = ("errors.py", "progress.py", "jobs.py", "tracking.py")
"""Modules that talk to people and to Snakemake but put no number into a result: an edit there recomputes nothing."""

NEUTRAL_LABELS = {f"{PACKAGE.name}/{name}" for name in NEUTRAL_MODULES}

Parsed = tuple[str, tuple[str, ...]]
"""Digest of a file's code, comments and docstrings left out, and the names that it imports."""


class CodeReader:
    """Digests of scripts with all that they import, each file parsed once.

    Parsing the library takes most of a second or two; with ``memory`` a start of the workflow parses only files that
    no earlier start has seen. The memory goes by the files' bytes, so that it can be old or missing, never wrong.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._known = _remembered(memory) if memory else {}
        self._used: dict[str, Parsed] = {}
        self._files: dict[Path, tuple[str, tuple[Path, ...]]] = {}

    def digest(self, script: Path) -> str:
        """Digest of a script and of every circuitflow module it imports, comments and docstrings left out.

        A cosmetic edit keeps it; any other edit to the script or to something it imports, however deep, changes it.
        """
        counted = [path for path in self.closure(script) if _label(path) not in NEUTRAL_LABELS]
        return digest(canonical_json({_label(path): self._read(path)[0] for path in counted}))

    def closure(self, script: Path) -> list[Path]:
        """The script and every file of the package that it imports, directly or not, sorted by name.

        Imports inside functions count, since a stage may run them; targets named as text (lazy registries) do not.
        """
        found: set[Path] = set()
        waiting = [script.resolve()]
        while waiting:
            path = waiting.pop()
            if path not in found:
                found.add(path)
                waiting.extend(self._read(path)[1])
        return sorted(found)

    def remember(self) -> None:
        """Write what was parsed into the memory, if anything there was new; a folder that is read-only stays so."""
        if self._memory is None or self._used.keys() <= self._known.keys():
            return
        try:
            write_text(self._memory, canonical_json(self._used))
        except OSError:
            return

    def _read(self, path: Path) -> tuple[str, tuple[Path, ...]]:
        if path not in self._files:
            source = path.read_bytes()
            # What is derived depends on this module and on Python's own grammar, too.
            key = digest(canonical_json([digest(source), _label(path), sys.version, OWN_DIGEST]))
            self._used[key] = self._known.get(key) or _parse(source, path)
            code, names = self._used[key]
            self._files[path] = code, tuple(file for name in names for file in _module_files(name))
        return self._files[path]


OWN_DIGEST = digest(Path(__file__).read_bytes())


def _remembered(memory: Path) -> dict[str, Parsed]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
        return {key: (code, tuple(names)) for key, (code, names) in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # missing, or not what remember() writes
        return {}


def _label(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent)) if path.is_relative_to(PACKAGE.parent) else path.name


def _parse(source: bytes, path: Path) -> Parsed:
    tree = ast.parse(source, filename=str(path))
    names: set[str] = set()
    for node in ast.walk(tree):
        names.update(_imported_names(node, path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return digest(ast.unparse(tree)), tuple(sorted(names))


def _imported_names(node: ast.AST, path: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level]
            base = ".".join((*parts, *([node.module] if node.module else [])))
        else:
            base = node.module or ""
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _module_files(name: str) -> Iterator[Path]:
    """Files that importing ``name`` executes: the packages on the way and the module itself, if they are ours."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return
    for end in range(1, len(parts) + 1):
        base = PACKAGE.parent.joinpath(*parts[:end])
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                yield file

"""Digests of values, files and code: what an artefact was made from, and whether it is still current."""

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
NEUTRAL_MODULES = ("errors.py", "progress.py", "jobs.py", "tracking.py")
"""Modules that talk to people and to Snakemake but put no number into a result: an edit there recomputes nothing."""

NEUTRAL_LABELS = {f"{PACKAGE.name}/{name}" for name in NEUTRAL_MODULES}

REPORTED_LIBRARIES = ("circuitflow", "torch", "transformers", "numpy", "zarr", "safetensors", "pyarrow")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spare space, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: str | bytes) -> str:
    """32 hexadecimal digits (BLAKE2b, 128 bits) of a text or of bytes."""
    data = value.encode() if isinstance(value, str) else value
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """:func:`digest` of a file's bytes, read in pieces."""
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the libraries that can change a number."""
    found = {}
    for name in REPORTED_LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_digest(script: Path) -> str:
    """Digest of a script and of every circuitflow module it imports, comments and docstrings left out.

    A cosmetic edit keeps it; any other edit to the script or to something it imports, however deep, changes it.
    """
    counted = [path for path in import_closure(script) if _label(path) not in NEUTRAL_LABELS]
    parts = {_label(path): _read(path)[0] for path in counted}
    return digest(canonical_json(parts))


def import_closure(script: Path) -> list[Path]:
    """The script and every file of the package that it imports, directly or not, sorted by name.

    Imports inside functions count, since a stage may run them; targets named as text (lazy registries) do not.
    """
    found: set[Path] = set()
    waiting = [script.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(_read(path)[1])
    return sorted(found)


def _label(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent)) if path.is_relative_to(PACKAGE.parent) else path.name


@cache
def _read(path: Path) -> tuple[str, tuple[Path, ...]]:
    """Digest of a file's code, comments and docstrings left out, and the files of the package that it imports.

    One parse serves both: every start of the workflow reads the whole library.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
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
    files = tuple(file for name in sorted(names) for file in _module_files(name))
    return digest(ast.unparse(tree)), files


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

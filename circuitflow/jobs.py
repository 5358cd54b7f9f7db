"""Running one stage as a job: inputs, parameters and outputs in, a log, progress and one-sentence errors out.

A stage is a function ``compute(inputs, params, out)`` in the library; a workflow script hands it to :func:`run_stage`
(work that is kept under its fingerprint) or :func:`run_light` (quick work, always done again).
"""

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuitflow import progress as board
from circuitflow.errors import UserError
from circuitflow.progress import logger, progress
from circuitflow.provenance import canonical_json, digest, versions
from circuitflow.store.files import write_json
from circuitflow.store.objects import Manifest, ObjectFolder, Recipe, content_of, publish

__all__ = ["Output", "Stage", "progress", "run_light", "run_stage"]

Inputs = Mapping[str, Any]
"""Declared inputs by name: a path, or a list of paths."""


@dataclass
class Output:
    """Where a stage writes and what it tells about its result."""

    folder: Path
    files: dict[str, Path]
    provenance: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    content: str | None = None
    """Digest of the result's data; by default made from the declared files."""


Arrays = Sequence[str] | Callable[[Any], Sequence[str]]
"""Arrays of a store: names with wildcards in braces, or a function of the job that names them."""
Stage = Callable[[Inputs, Mapping[str, Any], Output], None]


def run_stage(
    job: Any,
    compute: Stage,
    kind: str | None = None,
    arrays: Mapping[str, Arrays] | None = None,
    checks: Mapping[str, Any] | None = None,
) -> None:
    """Run a stage whose work is kept: done before under the same fingerprint, it ends at once.

    ``job`` is Snakemake's script object. An output named ``manifest`` becomes a :class:`Manifest` of the given
    ``kind``; every other output is a file that ``compute`` writes in the object's folder, copied to its declared place.
    ``arrays`` names, per input, the arrays of a store that the stage reads, wildcards in braces ("{site}/clean"); only
    their content enters the fingerprint. ``checks`` are further parameters that can make the stage refuse its work
    but not change its result: they are no part of the fingerprint.
    """
    with _environment(job):
        recipe, inputs = _recipe(job, arrays or {})
        root = _model_folder(job)
        again = job.rule in os.environ.get("CIRCUITFLOW_RECOMPUTE", "").split(",")
        with ObjectFolder(root, recipe, recompute=again) as kept:
            if kept.complete:
                logger.info("%s: kept from an earlier run (object %s)", _name(job), recipe.fingerprint)
            else:
                _compute(kept, compute, job, inputs, checks or {})
            _publish(kept, job, kind, inputs, root)


def run_light(job: Any, compute: Stage) -> None:
    """Run a quick stage that writes its declared outputs directly and keeps nothing else.

    An output named ``provenance`` is written here: a JSON file beside outputs that have no room for it.
    """
    with _environment(job):
        recipe, inputs = _recipe(job, {})
        files = {name: Path(path) for name, path in job.output.items()}
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        folder = next(iter(files.values())).parent
        out = Output(folder, files, _provenance(recipe))
        compute(inputs, recipe.params, out)
        if "provenance" in files:  # for formats that cannot carry it themselves
            write_json(files["provenance"], {"provenance": out.provenance, "details": out.details})


def _compute(kept: ObjectFolder, compute: Stage, job: Any, inputs: Inputs, checks: Mapping[str, Any]) -> None:
    files = {name: kept.path / Path(path).name for name, path in job.output.items() if name != "manifest"}
    provenance = {**_provenance(kept.recipe), "object": kept.recipe.fingerprint}
    out = Output(kept.path, files, provenance)
    compute(inputs, {**kept.recipe.params, **checks}, out)
    content = out.content or digest(
        canonical_json({name: content_of(path) for name, path in sorted(files.items())})
    )
    kept.finish(content, out.details)


def _publish(kept: ObjectFolder, job: Any, kind: str | None, inputs: Inputs, root: Path) -> None:
    for name, path in job.output.items():
        if name != "manifest":
            publish(kept.path / Path(path).name, Path(path))
            continue
        record = kept.record()
        Manifest(
            kind=kind or job.rule,
            object=kept.recipe.fingerprint,
            content=record["content"],
            provenance=_provenance(kept.recipe),
            details=record["details"],
            sources=_relative(inputs, root),
        ).write(Path(path))


def _recipe(job: Any, arrays: Mapping[str, Arrays]) -> tuple[Recipe, Inputs]:
    inputs = {
        name: [Path(path) for path in value] if isinstance(value, list | tuple) else Path(value)
        for name, value in _named(job.input)
    }
    wildcards = dict(job.wildcards.items())
    read = {
        name: listed(job) if callable(listed) else [array.format(**wildcards) for array in listed]
        for name, listed in arrays.items()
    }
    contents = {
        name: [content_of(path) for path in value]
        if isinstance(value, list)
        else content_of(value, read.get(name, ()))
        for name, value in inputs.items()
    }
    params = json.loads(canonical_json(dict(job.params.items())))
    code = params.pop("code")
    params.pop("named", None)  # made of the others, for Snakemake
    return Recipe(job.rule, params, contents, code), inputs


def _named(values: Any) -> Iterator[tuple[str, Any]]:
    """Named inputs; those that a rule lists as a list stay lists (Snakemake flattens a list of one to its item)."""
    for name, value in values.items():
        yield name, list(value) if not isinstance(value, str) else value


def _relative(inputs: Inputs, root: Path) -> dict[str, Any]:
    def relative(path: Path) -> str:
        return os.path.relpath(path, root)

    return {
        name: [relative(path) for path in value] if isinstance(value, list) else relative(value)
        for name, value in inputs.items()
    }


def _provenance(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.as_dict(), "versions": versions()}


def _model_folder(job: Any) -> Path:
    """``results/{model}``: the folder that an output's path shares with its objects."""
    first = Path(next(iter(job.output)))
    return Path(*first.parts[: first.parts.index("results") + 2])


def _name(job: Any) -> str:
    return " ".join([job.rule, *(str(value) for value in job.wildcards)])


@contextmanager
def _environment(job: Any) -> Iterator[None]:
    """Log, progress board and compute settings of one job; a user's mistake ends it with one sentence."""
    log = Path(job.log[0])
    log.parent.mkdir(parents=True, exist_ok=True)
    _set_up_logging(log)
    board.announce(_name(job), log.with_suffix(".progress.json"))
    try:
        apply_compute(dict(job.params.items()).get("compute"))
        yield
    except UserError as error:
        _end(f"{_name(job)}: error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            _end_unexpected(job, error, log)
        _end(
            f"{_name(job)}: error: no space is left on the disk ({error.filename or Path.cwd()}); free some space and "
            "run again: finished shards and checkpoints are kept, and `circuitflow clean` lists what can go."
        )
    except Exception as error:
        _end_unexpected(job, error, log)
    finally:
        board.finish()
        _end_logging()


def _end_unexpected(job: Any, error: Exception, log: Path) -> None:
    logger.debug("%s", traceback.format_exc())
    _end(f"{_name(job)}: unexpected {type(error).__name__}: {error} (full trace in {log})")


def _end(sentence: str) -> None:
    logger.error(sentence)
    raise SystemExit(1)


def _set_up_logging(log: Path) -> None:
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    to_file = logging.FileHandler(log, mode="a", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_screen = logging.StreamHandler(sys.stderr)
    to_screen.setLevel(logging.INFO)
    logger.addHandler(to_file)
    logger.addHandler(to_screen)


def _end_logging() -> None:
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def apply_compute(compute: Mapping[str, Any] | None) -> None:
    """Threads and determinism change sums, so they come from the configuration and never from the machine."""
    if compute is None:
        return
    import torch

    torch.set_num_threads(int(compute["threads"]))
    if compute.get("deterministic", True):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=False)

"""Checking stores shard by shard, and recomputing exactly the shards that are damaged."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from circuitflow.errors import UserError, nearest
from circuitflow.jobs import Output, Stage, apply_compute
from circuitflow.progress import progress
from circuitflow.provenance import versions
from circuitflow.store.arrays import JOURNAL, SHARDS, DamagedShardError, Store
from circuitflow.store.files import atomic_path
from circuitflow.store.objects import Manifest, ObjectFolder, Recipe, content_of, read_manifest

STAGES = {
    "tokenize_corpus": "circuitflow.data.corpus:tokenize_corpus",
    "cache_activations": "circuitflow.data.activations:cache_activations",
    "cache_transcoder_activations": "circuitflow.data.activations:cache_activations",
    "cache_crosscoder_activations": "circuitflow.data.activations:cache_activations",
    "cache_first_activations": "circuitflow.data.activations:cache_activations",
    "cache_second_activations": "circuitflow.data.activations:cache_activations",
    "cache_gradients": "circuitflow.attribution.gradients:cache_gradients",
    "cache_method_gradients": "circuitflow.attribution.path_gradients:cache_method_gradients",
    "join_activations": "circuitflow.diffing.joining:join_activations",
}
"""Stages that make stores. Named as text, so that checking a store imports no model."""

READS = {"join_activations": "circuitflow.diffing.joining:arrays_read"}
"""Those that read some arrays of their inputs: the function that names them, from the stage's parameters."""


@dataclass(frozen=True)
class Damage:
    """One file of a store that is not what was written."""

    file: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.file} {self.problem}"


def verify(manifest: Path) -> list[Damage]:
    """Read every shard of a store and compare it with what was recorded when it was written.

    :raises UserError: no such manifest, not one of a store, or its object is gone.
    """
    folder = read_manifest(manifest, "store").folder(manifest)
    return list(_damages(folder, manifest))


def repair(manifest: Path) -> list[Damage]:
    """Recompute the damaged shards of a store, and no other, by the stage that made it; return what was repaired.

    Inputs and parameters are those recorded in the manifest. The result must be the data that the manifest names;
    otherwise the store is left as damaged as it was.

    :raises UserError: an input has changed or is gone, the recomputed data differ, or as for :func:`verify`.
    """
    described = read_manifest(manifest, "store")
    folder = described.folder(manifest)
    root = folder.parent.parent
    inputs = _recorded_inputs(described, root, manifest)
    compute = _stage(described.provenance["stage"])
    with ObjectFolder(root, _recipe(described)) as kept:
        if kept.path != folder:
            raise UserError(f"Manifest {manifest} does not fit its object {folder}; delete it and run again.")
        damages = list(_damages(folder, manifest))
        if damages:
            _recompute(compute, inputs, described, folder, damages, manifest)
    return damages


def _recompute(
    compute: Stage,
    inputs: Mapping[str, Any],
    described: Manifest,
    folder: Path,
    damages: list[Damage],
    manifest: Path,
) -> None:
    """Take the damaged files away, let the stage fill the gaps, and accept the result if it is what was there."""
    table = (folder / SHARDS).read_bytes() if (folder / SHARDS).is_file() else None
    params = described.provenance["params"]
    out = Output(folder, {}, described.provenance)
    for damage in damages:
        damage.file.unlink(missing_ok=True)
    apply_compute(params.get("compute"))
    compute(inputs, params, out)
    if out.content == described.content:
        return
    for file in (folder / JOURNAL, *(damage.file for damage in damages)):
        file.unlink(missing_ok=True)
    if table is not None:
        with atomic_path(folder / SHARDS) as temporary:
            temporary.write_bytes(table)
    raise UserError(
        f"The damaged shards of {manifest} came out different from what they were{_changed(described)}, so they were "
        f"not kept; delete {manifest} and {folder} and run again to remake the whole store."
    )


def _damages(folder: Path, manifest: Path) -> Iterator[Damage]:
    try:
        store = Store(folder, manifest, check_sizes=False)
    except DamagedShardError as error:
        yield Damage(error.file, error.problem)
        return
    if (folder / JOURNAL).exists():
        yield Damage(folder / JOURNAL, "tells of an unfinished repair")
    shards = [(name, index) for name in store.arrays for index in range(store.layout.n_shards)]
    unreadable = set()
    for done, (name, index) in enumerate(shards):
        progress("shards checked", done, len(shards))
        try:
            store.check_shard(name, index)
        except DamagedShardError as error:
            if error.file not in unreadable:  # damaged metadata spoil every shard of their array
                unreadable.add(error.file)
                yield Damage(error.file, error.problem)
    progress("shards checked", len(shards), len(shards))


def _recorded_inputs(described: Manifest, root: Path, manifest: Path) -> dict[str, Any]:
    """The inputs that made the store, as paths; each must still say what it said then."""
    inputs = {}
    read = _arrays_read(described.provenance["stage"], described.provenance["params"])
    for name, source in described.sources.items():
        paths = [root / path for path in source] if isinstance(source, list) else root / source
        now = (
            [content_of(path) for path in paths]
            if isinstance(paths, list)
            else content_of(paths, read.get(name, ()))
        )
        if now != described.provenance["inputs"][name]:
            raise UserError(
                f"Input '{name}' ({source}) has changed since {manifest} was made, so its shards cannot be recomputed; "
                "run the workflow, which remakes the store."
            )
        inputs[name] = paths
    return inputs


def _recipe(described: Manifest) -> Recipe:
    recorded = described.provenance
    return Recipe(recorded["stage"], recorded["params"], recorded["inputs"], recorded["code"])


def _stage(name: str) -> Stage:
    if name not in STAGES:
        raise UserError(f"Stage '{name}' cannot repair a store: {nearest(name, STAGES)}.")
    return cast(Stage, _named(STAGES[name]))


def _arrays_read(stage: str, params: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    """Arrays that count as input, by input; of the inputs that are not named all do."""
    return _named(READS[stage])(params) if stage in READS else {}


def _named(target: str) -> Any:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def _changed(described: Manifest) -> str:
    """A clause that names the libraries that have changed since the store was made."""
    before, now = described.provenance.get("versions", {}), versions()
    changed = [
        f"{name} {before[name]} → {now.get(name, 'none')}" for name in before if before[name] != now.get(name)
    ]
    return f" ({', '.join(changed)})" if changed else " (the code or the machine may have changed)"

"""Repair: really damaged stores come back bit by bit, and only what was damaged is computed."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.provenance import versions
from circuitflow.store import repair as repairing
from circuitflow.store.arrays import ArraySpec, StoreWriter, open_store
from circuitflow.store.files import write_json
from circuitflow.store.objects import Manifest, ObjectFolder, Recipe, content_of
from circuitflow.store.repair import repair, verify
from tests.fixtures.rule_files import rules

ROWS, SHARD_ROWS = 50, 8
SPECS = {"resid.0": ArraySpec((ROWS, 4), "float32"), "site/metric": ArraySpec((ROWS,), "bfloat16")}
PARAMS = {"scale": 2.0, "shard_rows": SHARD_ROWS}


class Stage:
    """A stage that counts the shards it computes; its values follow from its input and parameters."""

    def __init__(self) -> None:
        self.computed: list[int] = []

    def __call__(self, inputs, params, out: Output) -> None:
        offset = json.loads(inputs["numbers"].read_text())["offset"]
        assert inputs["several"][0].read_text() == "text"
        writer = StoreWriter(out.folder, SPECS, params["shard_rows"], {"block": 2})
        for index in writer.missing():
            self.computed.append(index)
            rows = np.arange(*writer.bounds(index), dtype=np.float32) * params["scale"] + offset
            writer.write_shard(index, {"resid.0": np.stack([rows] * 4, 1), "site/metric": rows})
        out.content, details = writer.finish()
        out.details.update(details)


@pytest.fixture
def stage(monkeypatch) -> Stage:
    module = ModuleType("made_for_repair")
    module.stage = Stage()
    monkeypatch.setitem(sys.modules, "made_for_repair", module)
    monkeypatch.setitem(repairing.STAGES, "made", "made_for_repair:stage")
    return module.stage


@pytest.fixture
def manifest(tmp_path, stage) -> Path:
    """The manifest of a finished store, and its input files, as a job leaves them."""
    root = tmp_path / "results" / "m"
    numbers, text = root / "corpus" / "numbers.json", tmp_path / "data" / "text.txt"
    write_json(numbers, {"offset": 1})
    text.parent.mkdir()
    text.write_text("text")
    contents = {"numbers": content_of(numbers), "several": [content_of(text)]}
    recipe = Recipe("made", PARAMS, contents, "code")
    with ObjectFolder(root, recipe) as kept:
        out = Output(kept.path, {}, {})
        stage({"numbers": numbers, "several": [text]}, PARAMS, out)
        kept.finish(out.content, out.details)
    path = root / "activations" / "manifest.json"
    sources = {"numbers": "corpus/numbers.json", "several": ["../../data/text.txt"]}
    provenance = {**recipe.as_dict(), "versions": versions()}
    Manifest("store", recipe.fingerprint, out.content, provenance, out.details, sources).write(path)
    stage.computed.clear()
    return path


def shard(manifest: Path, array: str, index: int) -> Path:
    store = open_store(manifest)
    return store.layout.file(store.folder, array, index)


def files(manifest: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in (manifest.parent.parent / "objects").rglob("*") if path.is_file()
    }


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "deleted": (lambda path: path.unlink(), "is missing"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "bytes instead of"),
    "emptied": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "bit flipped in the data": (lambda path: flip(path, 3), "is damaged"),
    "bit flipped in the index": (lambda path: flip(path, -6), "is damaged"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("array", list(SPECS))
def test_a_damaged_shard_is_found_and_recomputed_alone(manifest, stage, how, array):
    before = files(manifest)
    damaged = shard(manifest, array, 3)
    times = {path: path.stat().st_mtime_ns for path in before if "/c/" in str(path) and path != damaged}
    damage, problem = DAMAGES[how]
    damage(damaged)
    (found,) = verify(manifest)
    assert found.file == damaged
    assert problem in found.problem
    assert str(found) == f"{damaged} {found.problem}"
    assert repair(manifest) == [found]
    assert stage.computed == [3]
    assert files(manifest) == before
    assert len(times) == 13
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert verify(manifest) == []


def test_the_readers_sentence_names_the_command(manifest):
    file = shard(manifest, "resid.0", 1)
    flip(file, 0)
    with pytest.raises(UserError, match=f"Shard {file} .* circuitflow verify --repair {manifest}"):
        open_store(manifest).read("resid.0")


def test_several_shards_at_once(manifest, stage):
    before = files(manifest)
    shard(manifest, "resid.0", 0).unlink()
    flip(shardless(manifest, "resid.0", 6), 1)
    shardless(manifest, "site/metric", 2).unlink()
    assert len(verify(manifest)) == 3
    assert len(repair(manifest)) == 3
    assert stage.computed == [0, 2, 6]
    assert files(manifest) == before


def shardless(manifest: Path, array: str, index: int) -> Path:
    """Like :func:`shard`, for a store that can no longer be opened."""
    object_folder = next((manifest.parent.parent / "objects").iterdir())
    (place,) = (object_folder / "store.zarr" / array / "c").glob(f"{index}*")
    return place if place.is_file() else place / "0"


def test_values_swapped_for_other_valid_ones_are_found(manifest, stage):
    """Sizes and checksums are right, the rows are wrong: only the recorded digest can tell."""
    before = files(manifest)
    shard(manifest, "resid.0", 2).write_bytes(shard(manifest, "resid.0", 1).read_bytes())
    (found,) = verify(manifest)
    assert "other values" in found.problem
    repair(manifest)
    assert stage.computed == [2]
    assert files(manifest) == before


def test_a_whole_store_is_left_alone(manifest, stage):
    assert verify(manifest) == []
    assert repair(manifest) == []
    assert stage.computed == []


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_text("{}")])
def test_damaged_zarr_metadata_come_back_without_computing(manifest, stage, spoil):
    before = files(manifest)
    metadata = shard(manifest, "resid.0", 0).parents[2] / "zarr.json"
    spoil(metadata)
    assert [damage.file for damage in verify(manifest)] == [metadata]
    repair(manifest)
    assert stage.computed == []
    assert files(manifest) == before


def test_a_lost_table_means_computing_everything(manifest, stage):
    before = files(manifest)
    (open_store(manifest).folder / "shards.json").unlink()
    with pytest.raises(UserError, match="verify --repair"):
        open_store(manifest)
    repair(manifest)
    assert stage.computed == list(range(7))
    assert files(manifest) == before


def test_a_killed_repair_can_be_repeated(manifest, stage, monkeypatch):
    before = files(manifest)
    for index in (1, 4):
        shardless(manifest, "resid.0", index).unlink()
    real = StoreWriter.write_shard

    def dying(self, index, values):
        real(self, index, values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_shard", dying)
        with pytest.raises(KeyboardInterrupt):
            repair(manifest)
    with pytest.raises(UserError, match="unfinished repair"):
        open_store(manifest)
    repair(manifest)
    assert stage.computed == [1, 4]
    assert files(manifest) == before


def test_an_input_that_changed_is_refused(manifest, stage):
    write_json(manifest.parent.parent / "corpus" / "numbers.json", {"offset": 2})
    damaged = shard(manifest, "resid.0", 1)
    damaged.unlink()
    with pytest.raises(UserError, match=r"Input 'numbers' .* has changed"):
        repair(manifest)
    assert stage.computed == []


def test_other_data_than_before_are_not_accepted(manifest, monkeypatch):
    """Another library version may compute other values: then the store must not become a mixture."""
    damaged = shard(manifest, "resid.0", 1)
    damaged.unlink()
    before = files(manifest)
    monkeypatch.setattr(np, "arange", lambda *args, real=np.arange, **kwargs: real(*args, **kwargs) + 1)
    value = json.loads(manifest.read_text())
    value["provenance"]["versions"]["numpy"] = "1.0"
    write_json(manifest, value)
    with pytest.raises(UserError, match=r"came out different .*numpy 1\.0 →"):
        repair(manifest)
    assert files(manifest) == before
    with pytest.raises(UserError, match="is missing"):
        open_store(manifest)


def test_a_manifest_of_other_data_is_refused(manifest):
    value = json.loads(manifest.read_text())
    value["content"] = "0" * 32
    write_json(manifest, value)
    with pytest.raises(UserError, match="holds other data"):
        open_store(manifest)


def test_a_store_in_work_is_not_repaired(manifest):
    shard(manifest, "resid.0", 1).unlink()
    recorded = json.loads(manifest.read_text())["provenance"]
    recipe = Recipe(recorded["stage"], recorded["params"], recorded["inputs"], recorded["code"])
    with (
        ObjectFolder(manifest.parent.parent, recipe),
        pytest.raises(UserError, match="Another process is already working"),
    ):
        repair(manifest)


def test_other_manifests_are_refused(tmp_path):
    Manifest("model", "0", "0", {}, {}).write(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="describes a model"):
        verify(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="does not exist"):
        repair(tmp_path / "other.json")


@pytest.mark.parametrize("name", sorted(repairing.STAGES))
def test_every_stage_that_makes_stores_can_be_called_for_a_repair(name):
    """Rules that harvest other sites, or another model, are made of ``cache_activations``."""
    made_of = re.sub("_(transcoder|crosscoder|first|second)_", "_", name)
    assert repairing._stage(name).__name__ == made_of


def test_every_rule_that_makes_a_store_can_be_repaired():
    """And where its script narrows inputs to some arrays, repair does the same."""
    texts = {name: rule.script.read_text() for name, rule in rules().items() if rule.script}
    stores = {name: text for name, text in texts.items() if 'kind="store"' in text}
    assert stores.keys() == repairing.STAGES.keys()
    assert {name for name, text in stores.items() if "arrays=" in text} == repairing.READS.keys()


def test_a_stage_that_is_not_known_is_named():
    with pytest.raises(UserError, match=r"'cache_activation' .* did you mean 'cache_activations'"):
        repairing._stage("cache_activation")

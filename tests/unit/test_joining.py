"""Stores of two models as one: the same shard files under two names, read like any other store."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuitflow.diffing import joining
from circuitflow.diffing.joining import arrays_read, check_vocabularies, join_activations, joint_layout
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.arrays import open_store
from circuitflow.store.objects import Manifest, ObjectFolder, Recipe, content_of
from circuitflow.store.repair import repair, verify
from circuitflow.store.shuffle import ROW, ShuffledRows
from tests.fixtures.activation_store import write_store

SITE = "resid.1"


@pytest.fixture
def inputs(tmp_path: Path, toy_manifest: Callable[..., Path]) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    stores = {
        name: write_store(tmp_path, name, {SITE: rows, "resid.2": rows + 1}, [7], 48)
        for name, rows in zip(("base", "tuned"), rng.normal(size=(2, 128, 6)).astype(np.float32), strict=True)
    }
    return {**stores, "model_base": toy_manifest(), "model_tuned": toy_manifest()}


def joined(root: Path, inputs: dict[str, Path], name: str = "joint") -> Path:
    """Run the stage; gives the manifest."""
    folder = root / "objects" / name
    folder.mkdir(parents=True, exist_ok=True)
    out = Output(folder, {}, {})
    join_activations(inputs, {"site": SITE}, out)
    assert out.content is not None
    manifest = root / name / "manifest.json"
    Manifest("store", name, out.content, {}, out.details).write(manifest)
    return manifest


def test_rows_of_both_models_stand_side_by_side(tmp_path: Path, inputs: dict[str, Path]) -> None:
    store = open_store(joined(tmp_path, inputs))
    assert sorted(store.arrays) == ["base:resid.1", "tuned:resid.1"]
    assert store.attrs == {"block": 16, "held_out_blocks": [7]}
    for name in ("base", "tuned"):
        assert np.array_equal(store.read(f"{name}:{SITE}"), open_store(inputs[name]).read(SITE))
        store.check_shard(f"{name}:{SITE}", 2)
    batch = ShuffledRows(store, sorted(store.arrays), 10, 100, seed=0).batch_at(3)
    assert np.array_equal(batch[f"tuned:{SITE}"], open_store(inputs["tuned"]).read(SITE)[batch[ROW]])


def test_shards_are_not_copied_and_joining_again_changes_nothing(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    store = open_store(joined(tmp_path, inputs))
    file = store.layout.file(store.folder, f"base:{SITE}", 0)
    source = open_store(inputs["base"])
    assert file.samefile(source.layout.file(source.folder, SITE, 0))
    again = open_store(joined(tmp_path, inputs))
    assert again.content == store.content
    assert not list(store.folder.rglob("*.tmp"))


def test_without_links_shards_are_copied_and_it_is_said_once(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    linked = open_store(joined(tmp_path, inputs))

    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(joining.logger, "propagate", True)
    with caplog.at_level("INFO"):
        copied = open_store(joined(tmp_path, inputs, "copied"))
    assert copied.content == linked.content
    file = copied.layout.file(copied.folder, f"base:{SITE}", 0)
    assert not file.samefile(linked.layout.file(linked.folder, f"base:{SITE}", 0))
    assert [record.message for record in caplog.records].count(joining.COPIED) == 1


def test_the_content_of_each_array_is_its_own(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """So that a training that reads one model alone does not hang on the other."""
    first = Manifest(**_json(joined(tmp_path, inputs)))
    other = np.random.default_rng(1).normal(size=(128, 6)).astype(np.float32)
    inputs["tuned"] = write_store(tmp_path, "other", {SITE: other}, [7], 48)
    second = Manifest(**_json(joined(tmp_path, inputs, "second")))
    before, after = (manifest.details["contents"] for manifest in (first, second))
    assert before[f"base:{SITE}"] == after[f"base:{SITE}"]
    assert before[f"tuned:{SITE}"] != after[f"tuned:{SITE}"]


def test_a_damaged_shard_is_not_spread(tmp_path: Path, inputs: dict[str, Path]) -> None:
    source = open_store(inputs["tuned"])
    file = source.layout.file(source.folder, SITE, 1)
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"circuitflow verify --repair .*tuned"):
        joined(tmp_path, inputs)


def test_a_lost_shard_is_repaired_whatever_became_of_other_arrays(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    manifest = kept(tmp_path, inputs)
    file = shard(manifest, f"base:{SITE}", 1)
    file.unlink()
    rows = open_store(inputs["base"]).read(SITE)
    wider = write_store(tmp_path, "wider", {SITE: rows, "resid.0": rows}, [7], 48)
    inputs["base"].write_bytes(wider.read_bytes())
    (done,) = repair(manifest)
    assert done.file == file
    assert verify(manifest) == []
    assert file.samefile(shard(inputs["base"], SITE, 1))


def test_a_store_of_other_values_repairs_nothing(tmp_path: Path, inputs: dict[str, Path]) -> None:
    manifest = kept(tmp_path, inputs)
    shard(manifest, f"base:{SITE}", 1).unlink()
    other = write_store(tmp_path, "other", {SITE: np.ones((128, 6), np.float32)}, [7], 48)
    inputs["base"].write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"Input 'base' .* has changed"):
        repair(manifest)


def test_damage_of_both_names_of_a_file_is_repaired_at_the_source_first(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    manifest = kept(tmp_path, inputs)
    source, file = shard(inputs["tuned"], SITE, 1), shard(manifest, f"tuned:{SITE}", 1)
    sound = source.read_bytes()
    file.write_bytes(sound[:10] + bytes([sound[10] ^ 1]) + sound[11:])
    assert source.read_bytes() != sound
    with pytest.raises(UserError, match=r"circuitflow verify --repair .*tuned/manifest"):
        repair(manifest)
    source.unlink()  # as the repair of that store does, which makes a new file
    source.write_bytes(sound)
    assert len(verify(manifest)) == 1
    repair(manifest)
    assert verify(manifest) == []
    assert file.samefile(source)


def test_stores_that_do_not_belong_together_are_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    rows = np.zeros((128, 6), np.float32)
    cases = {
        "is 7 wide at resid.1, but the run's is 6": write_store(
            tmp_path, "wide", {SITE: np.zeros((128, 7), np.float32)}, [7], 48
        ),
        "different text, or cut": write_store(tmp_path, "split", {SITE: rows}, [6], 48),
        "or cut differently": write_store(tmp_path, "cut", {SITE: rows}, [7], 64),
    }
    for sentence, other in cases.items():
        with pytest.raises(UserError, match=sentence):
            joint_layout({"base": open_store(inputs["base"]), "tuned": open_store(other)}, SITE)


def test_another_tokenizer_is_refused(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tokenizer:
        def __init__(self, words: dict[str, int]) -> None:
            self.get_vocab = lambda: words

    vocabularies = iter([{"a": 0, "b": 1}, {"a": 0, "c": 1, "d": 2}])
    monkeypatch.setattr(
        "circuitflow.diffing.joining.load_tokenizer", lambda manifest: Tokenizer(next(vocabularies))
    )
    with pytest.raises(UserError, match="another tokenizer: 1 of 2 tokens differ, for example 'b'"):
        joined(tmp_path, inputs)


def test_a_larger_vocabulary_is_accepted_and_a_smaller_one_refused() -> None:
    first = {"a": 0, "b": 1}
    check_vocabularies(first, {"a": 0, "b": 1, "<chat>": 2})
    with pytest.raises(UserError, match="1 of 3 tokens differ, for example '<chat>'"):
        check_vocabularies({**first, "<chat>": 2}, first)


def kept(root: Path, inputs: dict[str, Path]) -> Path:
    """Run the stage as a job does, with what a repair needs; gives the manifest."""
    params = {"site": SITE}
    read = arrays_read(params)
    contents = {name: content_of(path, read.get(name, ())) for name, path in inputs.items()}
    recipe = Recipe("join_activations", params, contents, "code")
    with ObjectFolder(root, recipe) as folder:
        out = Output(folder.path, {}, {})
        join_activations(inputs, params, out)
        assert out.content is not None
        folder.finish(out.content, out.details)
    sources = {name: os.path.relpath(path, root) for name, path in inputs.items()}
    manifest = root / "kept" / "manifest.json"
    provenance = {**recipe.as_dict(), "versions": {}}
    Manifest("store", recipe.fingerprint, out.content, provenance, out.details, sources).write(manifest)
    return manifest


def shard(manifest: Path, array: str, index: int) -> Path:
    store = open_store(manifest)
    return store.layout.file(store.folder, array, index)


def _json(path: Path) -> Any:
    return json.loads(path.read_text())

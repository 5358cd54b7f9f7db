"""Stores: what is written is read, whatever happens in between."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from circuitflow.errors import UserError
from circuitflow.store import arrays, layout
from circuitflow.store.arrays import ArraySpec, Store, StoreWriter

ROWS, SHARD_ROWS = 22, 5
SPECS = {
    "resid.1": ArraySpec((ROWS, 3), "float32"),
    "resid.9/gradient": ArraySpec((ROWS, 4, 2), "bfloat16"),
    "half": ArraySpec((ROWS, 3), "float16"),
    "metric": ArraySpec((ROWS,), "float32"),
    "tokens": ArraySpec((ROWS, 2), "int32"),
}


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for name, spec in SPECS.items():
        real = rng.standard_normal(spec.shape).astype(np.float32)
        made[name] = rng.integers(0, 50_000, spec.shape) if spec.dtype == "int32" else real
    made["half"][5:10] = 0.0  # a whole shard of Zarr's fill value
    return made


def write(folder: Path, values: dict[str, np.ndarray], limit: int | None = None) -> StoreWriter:
    writer = StoreWriter(folder, SPECS, SHARD_ROWS, {"block": 2})
    for index in writer.missing()[:limit]:
        start, stop = writer.bounds(index)
        writer.write_shard(index, {name: rows[start:stop] for name, rows in values.items()})
    return writer


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(folder: Path, values: dict[str, np.ndarray]) -> Store:
    write(folder, values).finish()
    return Store(folder, Path("results/m/activations/manifest.json"))


def as_torch(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values after a trip through an element type, rounded by torch."""
    return torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()


def test_reads_what_was_written_at_every_rank_and_across_shards(tmp_path, values):
    store = finished(tmp_path, values)
    for name, spec in SPECS.items():
        expected = values[name] if spec.dtype == "int32" else as_torch(values[name], spec.dtype)
        read = store.read(name)
        assert read.dtype == (np.int32 if spec.dtype == "int32" else np.float32)
        np.testing.assert_array_equal(read, expected)
        np.testing.assert_array_equal(store.read(name, 3, 21), expected[3:21])
        assert store.read(name, 7, 7).shape == (0, *spec.shape[1:])
    assert store.shape("resid.1") == (ROWS, 3)
    assert store.attrs == {"block": 2}


def test_any_zarr_library_can_read_it(tmp_path, values):
    finished(tmp_path, values)
    group = zarr.open_group(tmp_path / "store.zarr", mode="r")
    np.testing.assert_array_equal(group["resid.1"][:], values["resid.1"])
    bits = group["resid.9/gradient"]
    assert bits.attrs["dtype"] == "bfloat16"
    np.testing.assert_array_equal(
        (bits[:].astype(np.uint32) << 16).view(np.float32), as_torch(values["resid.9/gradient"], "bfloat16")
    )


def test_one_checked_file_per_array_and_shard(tmp_path, values):
    store = finished(tmp_path, values)
    for name in SPECS:
        for index in range(5):
            assert store.layout.file(tmp_path, name, index).is_file()
    codecs = json.loads((tmp_path / "store.zarr" / "half" / "zarr.json").read_text())["codecs"][0][
        "configuration"
    ]
    assert [codec["name"] for codec in codecs["codecs"]] == ["bytes", "crc32c"]


def test_content_is_a_digest_of_the_data_alone(tmp_path, values):
    content, details = write(tmp_path / "a", values).finish()
    assert content == write(tmp_path / "b", values).finish()[0]
    assert content == Store(tmp_path / "a", Path("m.json")).content
    assert len(json.dumps(details)) < 1000
    values["metric"][-1] += 1
    changed, other = write(tmp_path / "c", values).finish()
    assert changed != content
    differing = {name for name in SPECS if other["contents"][name] != details["contents"][name]}
    assert differing == {"metric"}


def test_bfloat16_rounds_like_torch():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[:1000] = (bits[:1000] & 0xFFFF0000) | 0x8000  # ties
    values = bits.view(np.float32)
    values = values[np.abs(values) < 3e38]
    stored = layout.narrow(values, "bfloat16", "values")
    np.testing.assert_array_equal(layout.widen(stored, "bfloat16"), as_torch(values, "bfloat16"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_that_are_not_finite_are_refused(dtype):
    with pytest.raises(UserError, match="array 'x' are not finite"):
        layout.narrow(np.array([1.0, np.nan], np.float32), dtype, "array 'x'")


def test_overflow_names_the_way_out():
    with pytest.raises(
        UserError, match=r"reach 7e\+04, too large for float16; set dtype to bfloat16 or float32"
    ):
        layout.narrow(np.array([-70_000.0], np.float32), "float16", "array 'x'")
    with pytest.raises(UserError, match="too large for bfloat16"):
        layout.narrow(np.array([np.finfo(np.float32).max]), "bfloat16", "array 'x'")
    with pytest.raises(UserError, match="too large for float32"):
        layout.narrow(np.array([1e300]), "float32", "array 'x'")


def test_unknown_dtype_and_array_name_the_choices(tmp_path, values):
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        ArraySpec((1, 2), "bfloat")
    with pytest.raises(UserError, match=r"no array 'resid\.2': did you mean 'resid\.1'"):
        finished(tmp_path, values).read("resid.2")


def test_resumes_at_the_shard_with_identical_files(tmp_path, values):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole, values).finish()
    write(broken, values, limit=2)
    shard = layout.Layout(SPECS, SHARD_ROWS, {}).file(broken, "half", 2)
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"half a shard")
    shard.with_suffix(".0123.partial").write_bytes(b"less than that")
    (broken / ".journal.jsonl.1.tmp").write_text("")
    with open(broken / "journal.jsonl", "a") as journal:
        journal.write('{"shard":2,"arr')
    before = layout.Layout(SPECS, SHARD_ROWS, {}).file(broken, "half", 1).stat().st_mtime_ns
    writer = write(broken, values)
    assert writer.missing() == []
    writer.finish()
    assert files(broken) == files(whole)
    assert layout.Layout(SPECS, SHARD_ROWS, {}).file(broken, "half", 1).stat().st_mtime_ns == before


class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it."""


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_kill_at_any_moment_leaves_a_store_that_can_go_on(tmp_path, values, monkeypatch, call):
    """Die before the n-th flush or rename, for every n, and go on each time from what is there."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole, values).finish()
    real = getattr(os, call.removeprefix("os."))
    kept = []
    for moment in range(1000):
        left = [moment + 1]

        def dying(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(call, dying)
            try:
                write(broken, values, limit=1)
                if not StoreWriter(broken, SPECS, SHARD_ROWS, {"block": 2}).missing():
                    break
            except Killed:
                pass
        kept.append(5 - len(StoreWriter(broken, SPECS, SHARD_ROWS, {"block": 2}).missing()))
    assert kept == sorted(kept)
    assert kept[-1] > 0
    write(broken, values).finish()
    assert files(broken) == files(whole)


def test_a_finished_shard_that_has_gone_counts_as_missing(tmp_path, values):
    write(tmp_path, values, limit=3)
    layout.Layout(SPECS, SHARD_ROWS, {}).file(tmp_path, "metric", 1).unlink()
    assert StoreWriter(tmp_path, SPECS, SHARD_ROWS, {"block": 2}).missing() == [1, 3, 4]


def test_another_layout_in_the_same_folder_is_refused(tmp_path, values):
    write(tmp_path, values, limit=1)
    with pytest.raises(UserError, match="another layout"):
        StoreWriter(tmp_path, SPECS, SHARD_ROWS + 1, {"block": 2})


def test_a_full_disk_is_one_sentence_and_finished_shards_stay(tmp_path, values, monkeypatch):
    write(tmp_path, values, limit=2)
    calls = []

    def full(path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(arrays, "sync_file", full)
        with pytest.raises(UserError) as caught:
            write(tmp_path, values)
    needed = 5 * (3 * 4 + 8 * 2 + 3 * 2 + 4 + 2 * 4)
    assert str(tmp_path) in str(caught.value)
    assert f"{needed} bytes needed" in str(caught.value)
    assert "finished shards are kept" in str(caught.value)
    assert not any(path.exists() for path in calls)  # what did not fit gives its space back
    writer = StoreWriter(tmp_path, SPECS, SHARD_ROWS, {"block": 2})
    assert writer.missing() == [2, 3, 4]


def test_other_errors_of_the_disk_are_not_disguised(tmp_path, values, monkeypatch):
    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(arrays, "sync_file", broken)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path, values)


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "bytes instead of":
        file.write_bytes(content[:-7])
    else:
        middle = len(content) // 3
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["missing", "bytes instead of"])
@pytest.mark.parametrize("name", ["resid.9/gradient", "metric"])
def test_a_missing_or_cut_shard_fails_on_open_and_on_read(tmp_path, values, name, how):
    store = finished(tmp_path, values)
    file = store.layout.file(tmp_path, name, 2)
    damage(file, how)
    expected = f"Shard {file} .*{how}.*circuitflow verify --repair results/m/activations/manifest.json"
    with pytest.raises(UserError, match=expected):
        Store(tmp_path, store.manifest)
    with pytest.raises(UserError, match=expected):
        store.read(name, 11, 12)
    store.read(name, 0, 10)  # the other shards are none the worse


@pytest.mark.parametrize("name", list(SPECS))
def test_a_flipped_bit_fails_on_read(tmp_path, values, name):
    store = finished(tmp_path, values)
    file = store.layout.file(tmp_path, name, 2)
    damage(file, "flip")
    with pytest.raises(UserError, match=f"Shard {file} is damaged .*verify --repair"):
        Store(tmp_path, store.manifest).read(name)


def test_an_unfinished_store_is_not_opened(tmp_path, values):
    write(tmp_path, values, limit=2)
    with pytest.raises(UserError, match=r"shards\.json is missing"):
        Store(tmp_path, Path("m.json"))


def test_a_shard_of_wrong_shape_or_name_is_refused(tmp_path, values):
    writer = StoreWriter(tmp_path, SPECS, SHARD_ROWS)
    with pytest.raises(ValueError, match="rows 20 to 22 are needed"):
        writer.write_shard(4, {name: rows[:5] for name, rows in values.items()})
    with pytest.raises(ValueError, match="a shard needs"):
        writer.write_shard(0, {"half": values["half"][:5]})
    with pytest.raises(ValueError, match="still to be written"):
        writer.finish()


def test_chunks_divide_shards_and_come_near_their_aim():
    assert layout._chunk_rows(ArraySpec((10**6, 576), "float32"), 8192) == 512
    assert layout._chunk_rows(ArraySpec((10**6,), "float32"), 8192) == 8192
    assert layout._chunk_rows(ArraySpec((100, 20, 576), "float32"), 97) == 97

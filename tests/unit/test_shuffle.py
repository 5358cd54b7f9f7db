"""Shuffled reading: every kept row once an epoch, the same order from any starting point, bounded memory."""

from pathlib import Path

import numpy as np
import pytest

from circuitflow.errors import UserError
from circuitflow.store.arrays import ArraySpec, Store, StoreWriter
from circuitflow.store.shuffle import ShuffledRows

ROWS = 1000
KEEP = np.random.default_rng(3).random(ROWS) < 0.7


class Counting(Store):
    """A store that remembers how many rows each read asked for, and takes them from memory: tests read often."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, Path("manifest.json"))
        self.whole = {name: Store.read_stored(self, name) for name in self.arrays}
        self.reads: list[int] = []

    def read_stored(self, array: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = self.whole[array][start:stop]
        self.reads.append(len(rows))
        return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Arrays whose values tell their row; "b" is kept in 16 bits, in which these values are exact."""
    folder = tmp_path_factory.mktemp("store")
    specs = {
        "a": ArraySpec((ROWS, 2), "float32"),
        "b": ArraySpec((ROWS, 3), "bfloat16"),
        "token": ArraySpec((ROWS,), "int32"),
    }
    writer = StoreWriter(folder, specs, shard_rows=150)
    row = np.arange(ROWS)
    values = {"a": np.stack([row, -row], 1) + 0.5, "b": np.stack([row % 128] * 3, 1) + 0.0, "token": row}
    for index in writer.missing():
        start, stop = writer.bounds(index)
        writer.write_shard(index, {name: rows[start:stop] for name, rows in values.items()})
    writer.finish()
    return folder


@pytest.fixture
def store(folder) -> Counting:
    return Counting(folder)


def rows_of(batches) -> np.ndarray:
    return np.concatenate([batch["row"] for batch in batches])


@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "some"])
@pytest.mark.parametrize("buffer_rows", [37, 200, 5000])
@pytest.mark.parametrize("batch", [1, 32, 37])
def test_every_kept_row_comes_once_an_epoch(store, keep, buffer_rows, batch):
    shuffled = ShuffledRows(store, ["token"], batch, buffer_rows, seed=1, keep=keep)
    kept = np.arange(ROWS) if keep is None else np.flatnonzero(keep)
    for epoch in range(2):
        batches = list(shuffled.iterate(epoch))
        sizes = [len(one["row"]) for one in batches]
        assert len(batches) == shuffled.batches_per_epoch == -(-len(kept) // batch)
        assert max(sizes) <= batch
        assert max(sizes) - min(sizes) <= 1
        np.testing.assert_array_equal(np.sort(rows_of(batches)), kept)
        assert not np.array_equal(rows_of(batches), kept) or buffer_rows < 2


@pytest.mark.parametrize("buffer_rows", [100, 5000])
def test_a_batch_is_a_pure_function_of_seed_and_number(folder, buffer_rows):
    def shuffled(seed: int = 7) -> ShuffledRows:
        return ShuffledRows(Counting(folder), ["a"], 48, buffer_rows, seed=seed, keep=KEEP)

    whole = shuffled()
    per_epoch = whole.batches_per_epoch
    in_order = [batch["a"] for epoch in range(3) for batch in whole.iterate(epoch)]
    for number in (0, 5, per_epoch - 1, per_epoch, 2 * per_epoch + 3):
        np.testing.assert_array_equal(shuffled().batch_at(number)["a"], in_order[number])
        np.testing.assert_array_equal(whole.batch_at(number)["a"], in_order[number])  # backwards too
    rest = [batch["a"] for batch in shuffled().iterate(1, start_batch=4)]
    assert len(rest) == per_epoch - 4
    for one, other in zip(rest, in_order[per_epoch + 4 :], strict=False):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(in_order[0], in_order[per_epoch])
    assert not np.array_equal(in_order[0], shuffled(seed=8).batch_at(0)["a"])


@pytest.mark.parametrize("buffer_rows", [100, 5000])
def test_arrays_come_in_the_same_order_and_their_own_types(store, buffer_rows):
    shuffled = ShuffledRows(store, ["a", "b", "token"], 64, buffer_rows, seed=0, keep=KEEP)
    for batch in shuffled.iterate(0):
        row = batch["row"]
        np.testing.assert_array_equal(batch["token"], row)
        np.testing.assert_array_equal(batch["a"], np.stack([row, -row], 1) + 0.5)
        np.testing.assert_array_equal(batch["b"], np.stack([row % 128] * 3, 1))
        assert [batch[name].dtype for name in ("a", "b", "token")] == [np.float32, np.float32, np.int32]


def test_what_fits_is_read_once_for_all_epochs(store):
    shuffled = ShuffledRows(store, ["a"], 64, buffer_rows=int(KEEP.sum()), seed=0, keep=KEEP)
    assert shuffled.resident
    for epoch in range(3):
        list(shuffled.iterate(epoch))
    assert sum(store.reads) == ROWS


def test_memory_stays_within_the_buffer_and_reading_in_order_reads_nothing_twice(store):
    shuffled = ShuffledRows(store, ["a"], 32, buffer_rows=128, seed=0)
    for epoch in range(2):
        list(shuffled.iterate(epoch))
    assert not shuffled.resident
    assert len(shuffled._buffers["a"]) == 128
    assert max(store.reads) <= 128 // 32
    assert sum(store.reads) == 2 * ROWS


def test_a_window_mixes_rows_from_all_over_the_store(store):
    first = ShuffledRows(store, ["a"], 64, buffer_rows=128, seed=0).batch_at(0)["row"]
    assert first.min() < ROWS / 4
    assert first.max() > ROWS * 3 / 4
    assert len(np.unique(first // 50)) > 10  # of 20 stretches of the store


def test_places_in_the_order_are_uniform(store):
    """Each row is as likely early as late: over many epochs its mean place is the middle."""
    shuffled = ShuffledRows(store, ["token"], 100, buffer_rows=100, seed=0)
    places = np.empty((60, ROWS))
    for epoch in range(60):
        places[epoch, rows_of(shuffled.iterate(epoch))] = np.arange(ROWS)
    standard_error = ROWS / np.sqrt(12 * 60)
    assert abs(places.mean(0) - (ROWS - 1) / 2).max() < 4.5 * standard_error


def test_mistakes_are_told(store):
    with pytest.raises(UserError, match="buffer_rows is 10, but a batch of 11"):
        ShuffledRows(store, ["a"], 11, 10, seed=0)
    with pytest.raises(UserError, match="No row of"):
        ShuffledRows(store, ["a"], 1, 10, seed=0, keep=np.zeros(ROWS, bool))
    with pytest.raises(UserError, match="no array 'c'"):
        ShuffledRows(store, ["c"], 1, 10, seed=0)
    with pytest.raises(ValueError, match="keep must be"):
        ShuffledRows(store, ["a"], 1, 10, seed=0, keep=np.ones(3, bool))

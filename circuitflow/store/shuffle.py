"""Rows of a store in a random order that depends on the seed alone, read with bounded memory.

The store is cut into short runs of neighbouring rows. For each epoch the runs are permuted and taken in windows of at
most ``buffer_rows`` kept rows; within a window the rows are permuted. Reads are contiguous, a batch is one gather, and
a window mixes rows from at least :data:`RUNS_PER_WINDOW` places of the store. A store that fits into the buffer is
read once, stays in memory, and is permuted as a whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from circuitflow.errors import UserError
from circuitflow.store.arrays import Store
from circuitflow.store.layout import widen

RUNS_PER_WINDOW = 32

ROW = "row"
"""Key under which a batch tells which rows of the store it holds."""


@dataclass(frozen=True)
class _Plan:
    """The windows of one epoch: which runs each reads, and how many rows precede it in the epoch's order."""

    epoch: int
    runs: list[np.ndarray]
    starts: np.ndarray  # (windows + 1,)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Windows that hold places ``start`` to ``stop`` of the order, each with its own count of those places."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for window in range(first, len(self.runs)):
            before, after = int(self.starts[window]), int(self.starts[window + 1])
            if before >= stop:
                return
            yield window, max(start, before) - before, min(stop, after) - before


class ShuffledRows:
    """Batches of rows in a random order, the same rows for every array asked for.

    Every kept row comes exactly once an epoch. An epoch is cut into ⌈n / batch⌉ batches whose sizes differ by at most
    one row, so none is dropped and none is left with a handful of rows. What a batch holds is a pure function of
    the store, ``keep``, ``batch``, ``buffer_rows``, ``seed`` and the batch's number: a run can go on from any batch.

    :param arrays: names of arrays of the store, at least one.
    :param batch: largest number of rows in a batch.
    :param buffer_rows: rows held in memory, in the store's own element types.
    :param keep: (rows,) which rows take part; all by default.
    :raises UserError: no row is kept, or the store has no such array.
    """

    def __init__(
        self,
        store: Store,
        arrays: Sequence[str],
        batch: int,
        buffer_rows: int,
        seed: int,
        keep: np.ndarray | None = None,
    ) -> None:
        if batch < 1 or buffer_rows < batch:
            raise UserError(
                f"Key buffer_rows is {buffer_rows}, but a batch of {batch} rows has to fit into it; "
                "raise buffer_rows or lower batch (at least 1)."
            )
        if keep is not None and (keep.shape != (store.rows,) or keep.dtype != np.bool_):
            raise ValueError(f"keep must be ({store.rows},) bool, got {keep.shape} {keep.dtype}")
        self._store, self._seed, self._keep, self._buffer_rows = store, seed, keep, buffer_rows
        self._dtypes = {name: store.arrays[name].dtype for name in arrays if store.shape(name)}
        self._edges, self._kept = self._cut(
            min(store.layout.shard_rows, max(1, buffer_rows // RUNS_PER_WINDOW))
        )
        self.rows = int(self._kept.sum())
        if self.rows == 0:
            raise UserError(f"No row of {store.manifest} is left to read; every one is excluded.")
        self.batches_per_epoch = -(-self.rows // batch)
        self._buffers: dict[str, np.ndarray] = {}
        self._plan: _Plan | None = None
        self._window: tuple[int, int] | None = None
        self._order = np.empty(0, np.int64)

    @property
    def resident(self) -> bool:
        """Whether all kept rows fit into the buffer, so that the store is read once only."""
        return self.rows <= self._buffer_rows

    def batch_at(self, index: int) -> dict[str, np.ndarray]:
        """Batch number ``index``, counted over all epochs: arrays by name, (batch, …) float32 or int32.

        Under ``"row"`` it tells which rows of the store these are, (batch,) int64. Cheap in order; a jump costs the
        reading of one window.
        """
        epoch, number = divmod(index, self.batches_per_epoch)
        start = number * self.rows // self.batches_per_epoch
        stop = (number + 1) * self.rows // self.batches_per_epoch
        pieces = [self._gather(epoch, *piece) for piece in self._plan_of(epoch).pieces(start, stop)]
        joined = pieces[0]
        if len(pieces) > 1:
            joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in joined}
        return {name: widen(rows, self._dtypes.get(name, "int32")) for name, rows in joined.items()}

    def iterate(self, epoch: int, start_batch: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches of one epoch from number ``start_batch`` on; see :meth:`batch_at`."""
        for number in range(start_batch, self.batches_per_epoch):
            yield self.batch_at(epoch * self.batches_per_epoch + number)

    def _cut(self, run_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Edges of the runs (runs + 1,) and how many rows of each are kept (runs,)."""
        edges = np.append(np.arange(0, self._store.rows, run_rows), self._store.rows)
        if self._keep is None:
            return edges, np.diff(edges)
        return edges, np.diff(np.concatenate([[0], np.cumsum(self._keep)])[edges])

    def _plan_of(self, epoch: int) -> _Plan:
        if self._plan is None or self._plan.epoch != epoch:
            runs = np.flatnonzero(self._kept)
            if self.resident:
                windows = [runs]
            else:
                windows = _pack(self._rng(epoch, 0).permutation(runs), self._kept, self._buffer_rows)
            sizes = [int(self._kept[window].sum()) for window in windows]
            self._plan = _Plan(epoch, windows, np.concatenate([[0], np.cumsum(sizes)]))
        return self._plan

    def _gather(self, epoch: int, window: int, start: int, stop: int) -> dict[str, np.ndarray]:
        if self._window != (epoch, window):
            runs = self._plan_of(epoch).runs[window]
            if not (self.resident and self._buffers):
                self._load(runs)
            self._order = self._rng(epoch, 1 + window).permutation(int(self._kept[runs].sum()))
            self._window = epoch, window
        chosen = self._order[start:stop]
        return {name: buffer[chosen] for name, buffer in self._buffers.items()}

    def _load(self, runs: np.ndarray) -> None:
        """Read the kept rows of some runs into the buffers, which are made once and used again."""
        self._window = None
        if not self._buffers:
            size = min(self.rows, self._buffer_rows)
            self._buffers = {ROW: np.empty(size, np.int64)}
        filled = 0
        for run in runs:
            start, stop = int(self._edges[run]), int(self._edges[run + 1])
            kept = slice(None) if self._keep is None else self._keep[start:stop]
            place = slice(filled, filled + int(self._kept[run]))
            for name in self._dtypes:
                rows = self._store.read_stored(name, start, stop)[kept]
                self._buffer(name, rows)[place] = rows
            self._buffers[ROW][place] = np.arange(start, stop)[kept]
            filled = place.stop

    def _buffer(self, name: str, like: np.ndarray) -> np.ndarray:
        if name not in self._buffers:
            self._buffers[name] = np.empty((len(self._buffers[ROW]), *like.shape[1:]), like.dtype)
        return self._buffers[name]

    def _rng(self, epoch: int, stream: int) -> np.random.Generator:
        # Always three numbers: SeedSequence takes [1, 2] and [1, 2, 0] for the same seed.
        return np.random.default_rng([self._seed, epoch, stream])


def _pack(runs: np.ndarray, kept: np.ndarray, limit: int) -> list[np.ndarray]:
    """Cut an order of runs into windows that hold at most ``limit`` kept rows each."""
    windows: list[list[int]] = [[]]
    held = 0
    for run in runs:
        if windows[-1] and held + kept[run] > limit:
            windows.append([])
            held = 0
        windows[-1].append(int(run))
        held += int(kept[run])
    return [np.array(window) for window in windows]

"""Compiled loops for the sparse parts of dictionaries on the CPU: selecting entries, dot products, differences.

What torch has no quick form for is here; sums of rows stay with its ``embedding_bag``. Vectors are shared out among
``torch.get_num_threads()`` threads in runs of neighbours, and each row of a result is made by one thread in a fixed
order, so results do not depend on the number of threads.
"""

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.compiling import LOCK, Array, as_array, compiled, offsets_of, parts_of

MARKS = 512  # entries of a row that are compared at once
FEWEST_LANES = 128


def largest_of_rows(pre: Float[Tensor, "n d_dict"], k: int) -> Codes:
    """The ``k`` ≥ 1 largest entries of each row, those not positive left out; of equal ones the first."""
    n, d_dict = pre.shape
    k = min(k, d_dict)
    features, counts = np.empty((n, k), np.int64), np.empty(n, np.int64)
    values = np.empty((n, k), as_array(pre).dtype)
    with LOCK:
        _largest_of_rows(as_array(pre), k, _lanes(k, d_dict), parts_of(n), features, values, counts)
    if counts.sum() == n * k:
        offsets = torch.arange(0, n * k + 1, k)
        return Codes(offsets, torch.from_numpy(features).view(-1), torch.from_numpy(values).view(-1), d_dict)
    kept = np.arange(k) < counts[:, None]
    return Codes(offsets_of(counts), torch.from_numpy(features[kept]), torch.from_numpy(values[kept]), d_dict)


def above_threshold(pre: Float[Tensor, "n d_dict"], threshold: Float[Tensor, " d_dict"]) -> Codes:
    """The entries above a threshold of each column's own."""
    n, d_dict = pre.shape
    limits, counts = as_array(threshold.to(pre.dtype)), np.empty(n, np.int64)
    with LOCK:
        _count_above(as_array(pre), limits, parts_of(n), counts)
        offsets = offsets_of(counts)
        features = np.empty(int(offsets[-1]), np.int64)
        values = np.empty(len(features), limits.dtype)
        _fill_above(as_array(pre), limits, offsets.numpy(), parts_of(n), features, values)
    return Codes(offsets, torch.from_numpy(features), torch.from_numpy(values), d_dict)


def largest_of_lists(codes: Codes, k: int) -> Codes:
    """The ``k`` ≥ 1 largest of each row's entries, those not positive left out; of equal ones the first."""
    features, counts = np.empty((codes.n, k), np.int64), np.empty(codes.n, np.int64)
    values = np.empty((codes.n, k), as_array(codes.values).dtype)
    given = (as_array(codes.offsets), as_array(codes.features), as_array(codes.values))
    with LOCK:
        _largest_of_lists(*given, k, parts_of(codes.n), features, values, counts)
    kept = np.arange(k) < counts[:, None]
    return Codes(
        offsets_of(counts), torch.from_numpy(features[kept]), torch.from_numpy(values[kept]), codes.d_dict
    )


def in_reach(
    rough: Float[Tensor, "n d_dict"],
    bias: Float[Tensor, " d_dict"],
    slack: tuple[Float[Tensor, " n"], Float[Tensor, " d_dict"], float],
    limits: Float[Tensor, " d_dict"],
    k: int,
) -> Codes:
    """The entries of rough + bias that may be above their limit, and among the ``k`` largest unless k is 0.

    :param rough: bfloat16; the true entry (i, j) lies within slack[0][i]·slack[1][j] + slack[2]·|rough[i, j]| of it.
    :return: values are left empty.
    """
    n, d_dict = rough.shape
    bits = rough.contiguous().view(torch.int16).numpy().view(np.uint16)
    lists, counts = np.empty((n, d_dict + 1), np.int32), np.empty(n, np.int64)
    rows, columns, relative = slack
    given = (bits, as_array(rows), as_array(columns), relative, as_array(bias), as_array(limits))
    with LOCK:
        _in_reach(*given, k, _lanes(k, d_dict) if k else 0, parts_of(n), lists, counts)
    offsets = offsets_of(counts)
    features = np.empty(int(offsets[-1]), np.int64)
    _join(lists, offsets.numpy(), features)
    return Codes(offsets, torch.from_numpy(features), bias.new_empty(len(features)), d_dict)


def products(
    codes: Codes, directions: Float[Tensor, "d_dict d_model"], vectors: Float[Tensor, "n d_model"]
) -> Float[Tensor, " nnz"]:
    """vectors[row]·directions[feature] of every entry."""
    out = torch.empty_like(codes.values)
    arrays = (as_array(codes.offsets), as_array(codes.features), as_array(directions), as_array(vectors))
    with LOCK:
        _products(*arrays, parts_of(codes.n), as_array(out))
    return out


def difference(first: Codes, second: Codes) -> Codes:
    """second − first, with an entry for every feature that is active in either."""
    given = (as_array(first.offsets), as_array(first.features), as_array(first.values))
    others = (as_array(second.offsets), as_array(second.features), as_array(second.values))
    features = np.empty(first.nnz + second.nnz, np.int64)
    values, offsets = np.empty(len(features), given[2].dtype), np.empty(first.n + 1, np.int64)
    n = _difference(*given, *others, offsets, features, values)
    return Codes(
        torch.from_numpy(offsets), torch.from_numpy(features[:n]), torch.from_numpy(values[:n]), first.d_dict
    )


def _lanes(k: int, d_dict: int) -> int:
    """Columns of the folded row whose maxima bound the k-th largest from below; 0 where folding gains nothing."""
    lanes = FEWEST_LANES
    while lanes < 2 * k:
        lanes *= 2
    return lanes if 4 * lanes <= d_dict else 0


@compiled()
def _kth_largest(values: Array, n: int, k: int) -> float:
    """The k-th largest of the first n values, which end in another order. Quickselect (Hoare)."""
    low, high, wanted = 0, n - 1, k - 1
    while low < high:
        pivot = values[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return values[wanted]


@compiled()
def _bound(row: Array, k: int, lanes: int, maxima: Array) -> float:
    """A number that at least k entries of the row reach, or 0: the k-th largest of the lanes' maxima.

    Entry j belongs to lane j % lanes. The loop runs over slices: with sums as indices it is not vectorised.
    """
    maxima[:] = 0
    for block in range(len(row) // lanes):
        part = row[block * lanes : (block + 1) * lanes]
        for lane in range(lanes):
            value, before = part[lane], maxima[lane]
            maxima[lane] = value if value > before else before  # noqa: FURB136 - NaN is no maximum
    return _kth_largest(maxima, lanes, k)


@compiled()
def _find(marks: Array, words: Array, width: int, start: int, found: Array, n: int) -> int:
    """Append start + place of every mark among the first ``width`` to ``found``, which has n entries so far.

    Eight marks are looked at as one word: most are empty.
    """
    for word in range((width + 7) // 8):
        if words[word]:
            for place in range(8 * word, min(8 * word + 8, width)):
                found[n] = start + place
                n += marks[place]
    return n


@compiled()
def _positive_from(row: Array, bound: float, marks: Array, words: Array, found: Array) -> int:
    """Columns of the row's positive entries that reach the bound, ascending, in ``found``; gives their number."""
    n = 0
    for start in range(0, len(row), MARKS):
        part = row[start : start + MARKS]
        for place in range(len(part)):
            marks[place] = (part[place] >= bound) & (part[place] > 0)
        n = _find(marks, words, len(part), start, found, n)
    return n


@compiled()
def _largest_of_row(
    row: Array, k: int, found: Array, n: int, scratch: Array, features: Array, values: Array
) -> int:
    """Of the n columns found, write the k with the largest entries; gives how many were written."""
    smallest, ties = row.dtype.type(0), 0
    if n > k:
        for i in range(n):
            scratch[i] = row[found[i]]
        smallest, ties = _kth_largest(scratch, n, k), k
        for i in range(n):
            ties -= row[found[i]] > smallest
    written = 0
    for i in range(n):
        value = row[found[i]]
        tie = value == smallest
        if value > smallest or (tie and ties > 0):
            ties -= tie
            features[written] = found[i]
            values[written] = value
            written += 1
    return written


@compiled(parallel=True)
def _largest_of_rows(
    pre: Array, k: int, lanes: int, parts: int, features: Array, values: Array, counts: Array
) -> None:
    n, d_dict = pre.shape
    for part in numba.prange(parts):
        maxima, scratch = np.empty(max(lanes, 1), pre.dtype), np.empty(d_dict, pre.dtype)
        found = np.empty(d_dict + 1, np.int64)  # one more: _find writes before it counts
        marks = np.zeros(MARKS, np.uint8)
        words = marks.view(np.uint64)
        for r in range(n * part // parts, n * (part + 1) // parts):
            bound = _bound(pre[r], k, lanes, maxima) if lanes else pre.dtype.type(0)
            m = _positive_from(pre[r], bound, marks, words, found)
            counts[r] = _largest_of_row(pre[r], k, found, m, scratch, features[r], values[r])


@compiled(parallel=True)
def _largest_of_lists(
    offsets: Array, columns: Array, entries: Array, k: int, parts: int, features: Array, values: Array, counts: Array
) -> None:  # fmt: skip
    n = len(offsets) - 1
    for part in numba.prange(parts):
        for r in range(n * part // parts, n * (part + 1) // parts):
            row = entries[offsets[r] : offsets[r + 1]]
            found, scratch, m = np.empty(len(row), np.int64), np.empty(len(row), entries.dtype), 0
            for i in range(len(row)):
                found[m] = i
                m += row[i] > 0
            counts[r] = _largest_of_row(row, k, found, m, scratch, features[r], values[r])
            for i in range(counts[r]):
                features[r, i] = columns[offsets[r] + features[r, i]]


@compiled()
def _reaching(
    low: Array, high: Array, limits: Array, least: np.float32, k: int, scratch: Array, marks: Array, words: Array,
    found: Array,
) -> int:  # fmt: skip
    """Columns whose upper end passes its limit, and if k > 0 the k-th largest lower end; gives their number."""
    m = 0
    for start in range(0, len(high), MARKS):
        entries, ends = high[start : start + MARKS], limits[start : start + MARKS]
        for place in range(len(entries)):
            marks[place] = (entries[place] > ends[place]) & (entries[place] >= least)
        m = _find(marks, words, len(entries), start, found, m)
    if not 0 < k < m:
        return m
    for i in range(m):
        scratch[i] = low[found[i]]
    tighter, written = _kth_largest(scratch, m, k), 0
    for i in range(m):
        found[written] = found[i]
        written += high[found[i]] >= tighter
    return written


@compiled(parallel=True)
def _in_reach(
    bits: Array, rows: Array, columns: Array, relative: float, bias: Array, limits: Array, k: int, lanes: int,
    parts: int, lists: Array, counts: Array,
) -> None:  # fmt: skip
    n, d_dict = bits.shape
    for part in numba.prange(parts):
        wide = np.empty(d_dict, np.uint32)
        rough = wide.view(np.float32)
        low, high = np.empty(d_dict, np.float32), np.empty(d_dict, np.float32)
        maxima, scratch = np.empty(max(lanes, 1), np.float32), np.empty(d_dict, np.float32)
        found, marks = np.empty(d_dict + 1, np.int64), np.zeros(MARKS, np.uint8)
        words = marks.view(np.uint64)
        for r in range(n * part // parts, n * (part + 1) // parts):
            narrow, reach = bits[r], rows[r]
            for j in range(d_dict):
                wide[j] = np.uint32(narrow[j]) << np.uint32(16)
            for j in range(d_dict):
                error, middle = reach * columns[j] + np.float32(relative) * abs(rough[j]), rough[j] + bias[j]
                low[j] = middle - error
                high[j] = middle + error
            least = np.float32(_bound(low, k, lanes, maxima) if lanes else -np.inf)
            counts[r] = _reaching(low, high, limits, least, k, scratch, marks, words, found)
            for i in range(counts[r]):
                lists[r, i] = found[i]


@compiled()
def _join(lists: Array, offsets: Array, features: Array) -> None:
    for r in range(len(offsets) - 1):
        for i in range(offsets[r + 1] - offsets[r]):
            features[offsets[r] + i] = lists[r, i]


@compiled(parallel=True)
def _count_above(pre: Array, threshold: Array, parts: int, counts: Array) -> None:
    n = pre.shape[0]
    for part in numba.prange(parts):
        for r in range(n * part // parts, n * (part + 1) // parts):
            row, count = pre[r], 0
            for j in range(len(row)):
                count += row[j] > threshold[j]
            counts[r] = count


@compiled(parallel=True)
def _fill_above(
    pre: Array, threshold: Array, offsets: Array, parts: int, features: Array, values: Array
) -> None:
    n, d_dict = pre.shape
    for part in numba.prange(parts):
        found = np.empty(d_dict + 1, np.int64)
        marks = np.zeros(MARKS, np.uint8)
        words = marks.view(np.uint64)
        for r in range(n * part // parts, n * (part + 1) // parts):
            row, m = pre[r], 0
            for start in range(0, d_dict, MARKS):
                entries, limits = row[start : start + MARKS], threshold[start : start + MARKS]
                for place in range(len(entries)):
                    marks[place] = entries[place] > limits[place]
                m = _find(marks, words, len(entries), start, found, m)
            for i in range(m):
                features[offsets[r] + i] = found[i]
                values[offsets[r] + i] = row[found[i]]


@compiled(parallel=True, fastmath={"reassoc", "contract"})  # so that sums are taken in vectors
def _products(
    offsets: Array, features: Array, directions: Array, vectors: Array, parts: int, out: Array
) -> None:
    n = len(offsets) - 1
    for part in numba.prange(parts):
        for r in range(n * part // parts, n * (part + 1) // parts):
            vector = vectors[r]
            for entry in range(offsets[r], offsets[r + 1]):
                direction = directions[features[entry]]
                total = out.dtype.type(0)
                for i in range(len(vector)):
                    total += vector[i] * direction[i]
                out[entry] = total


@compiled()
def _difference(
    offsets: Array, features: Array, values: Array, other_offsets: Array, other_features: Array, other: Array,
    new_offsets: Array, new_features: Array, new_values: Array,
) -> int:  # fmt: skip
    written, new_offsets[0] = 0, 0
    for r in range(len(offsets) - 1):
        i, j = offsets[r], other_offsets[r]
        while i < offsets[r + 1] or j < other_offsets[r + 1]:
            left = i < offsets[r + 1] and (j == other_offsets[r + 1] or features[i] <= other_features[j])
            right = j < other_offsets[r + 1] and (i == offsets[r + 1] or other_features[j] <= features[i])
            new_features[written] = features[i] if left else other_features[j]
            new_values[written] = (other[j] if right else 0) - (values[i] if left else 0)
            written, i, j = written + 1, i + left, j + right
        new_offsets[r + 1] = written
    return written

"""How loops are compiled and run: once per machine, by as many threads as torch has.

The first call of a kernel with an element type compiles it (seconds) and keeps it in ``__pycache__``, or, where
that cannot be written, in the user's cache folder; without either it is compiled in every process. A kernel calls
kernels of its own file alone: the kept one does not notice changes in others.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
Array = np.ndarray

LOCK = threading.Lock()  # one of numba's threading layers must not be entered from two threads at once


def compiled(**options: Any) -> Callable[[F], F]:
    """Decorator: compile at the first call, without the interpreter's lock."""

    def compile_later(function: F) -> F:
        try:
            return numba.njit(function, cache=True, nogil=True, **options)
        except RuntimeError:  # no folder for the cache can be written
            return numba.njit(function, nogil=True, **options)

    return compile_later


def as_array(tensor: Tensor) -> Array:
    """The same memory, in the one layout that kernels are compiled for."""
    return tensor.detach().contiguous().numpy()


def parts_of(n: int) -> int:
    """Number of runs that ``n`` vectors are cut into, one a thread."""
    wanted = torch.get_num_threads()
    threads = min(wanted, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # numba's first call sets OpenMP's number, which torch shares
        torch.set_num_threads(wanted)
    return max(1, min(threads, n))


def offsets_of(counts: Array) -> Int64[Tensor, " n_plus_1"]:
    """Where rows of so many entries begin, and the end of the last."""
    return torch.from_numpy(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))

"""Batches of one site or several, in the order of the store's shuffle, on the device that trains."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.store.shuffle import ShuffledRows


class Feed:
    """Batches by number. Beside a GPU the next one is read while the current one is trained on.

    On the CPU the reading would only take the step's own cores. What a batch holds depends on its number alone, so
    reading ahead changes nothing.
    """

    def __init__(
        self,
        rows: ShuffledRows,
        sites: str | Sequence[str],
        device: torch.device,
        steps: int,
        ahead: bool | None = None,
    ) -> None:
        """Batches 0 to ``steps`` − 1 of ``rows``; ``ahead`` overrides whether the next one is read early.

        Vectors of several sites lie side by side.
        """
        self._sites = [sites] if isinstance(sites, str) else list(sites)
        self._rows, self._device, self._steps = rows, device, steps
        ahead = device.type != "cpu" if ahead is None else ahead
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="feed") if ahead else None
        self._next: tuple[int, Future[Tensor]] | None = None

    def at(self, index: int) -> Float[Tensor, "batch d_model"]:
        """Batch number ``index``, raw activations."""
        if self._reader is None:
            return self._read(index).to(self._device)
        asked = self._next if self._next is not None and self._next[0] == index else self._ask(index)
        x = asked[1].result()
        self._next = self._ask(index + 1) if index + 1 < self._steps else None
        return x.to(self._device, non_blocking=True)

    def close(self) -> None:
        """End the reading ahead."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def _ask(self, index: int) -> tuple[int, Future[Tensor]]:
        assert self._reader is not None
        return index, self._reader.submit(self._read, index)

    def _read(self, index: int) -> Tensor:
        batch = self._rows.batch_at(index)
        parts = [batch[site] for site in self._sites]
        x = torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))
        return x.pin_memory() if self._device.type == "cuda" else x

"""Reading cached activations and gradients back, a batch of pairs at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuitflow.data.token_pairs import TokenPairs
from circuitflow.errors import UserError
from circuitflow.store.arrays import Store

PARTS = ("clean", "patched", "gradient")


@dataclass(frozen=True)
class Cached:
    """What cache_gradients keeps of one site for a batch of pairs; zero at padding."""

    clean: Float[Tensor, "batch pos width"]
    patched: Float[Tensor, "batch pos width"]
    gradient: Float[Tensor, "batch pos width"]
    """∂m/∂x on the run that ``gradient_run`` names."""
    gradient_run: str = "clean"

    @property
    def base(self) -> Float[Tensor, "batch pos width"]:
        """Activations of the run on which the gradient was taken."""
        return self.clean if self.gradient_run == "clean" else self.patched


@dataclass(frozen=True)
class Batch:
    """The pairs ``start`` to ``stop`` of a split, cut to the longest prompt among them."""

    start: int
    stop: int
    pairs: TokenPairs
    sites: dict[str, Cached]


def batches(
    store: Store, sites: Sequence[str], pairs: TokenPairs, size: int, device: str | torch.device = "cpu"
) -> Iterator[Batch]:
    """All pairs of a split in order, ``size`` at a time.

    :raises UserError: the store was made for other pairs, or lacks a site.
    """
    for start in range(0, len(pairs), size):
        yield read_batch(store, sites, pairs, start, min(start + size, len(pairs)), device)


def read_batch(
    store: Store,
    sites: Sequence[str],
    pairs: TokenPairs,
    start: int,
    stop: int,
    device: str | torch.device = "cpu",
) -> Batch:
    """The pairs ``start`` to ``stop``.

    :raises UserError: the store was made for other pairs, or lacks a site.
    """
    if store.rows != len(pairs):
        raise UserError(
            f"Store {store.manifest} holds {store.rows} pairs but the table of pairs has {len(pairs)}; "
            "run the stage cache_gradients again."
        )
    here = trimmed(pairs[start:stop])

    def read(array: str) -> Tensor:
        return torch.from_numpy(store.read(array, start, stop)[:, : here.mask.shape[1]].copy()).to(device)

    def cached(site: str) -> Cached:
        clean, patched, gradient = (read(f"{site}/{part}") for part in PARTS)
        return Cached(clean, patched, gradient, store.attrs["gradient_run"])

    return Batch(start, stop, here.to(device), {site: cached(site) for site in sites})


def trimmed(pairs: TokenPairs) -> TokenPairs:
    """The same pairs without positions that are padding in all of them."""
    longest = int(pairs.mask.sum(1).max())
    return replace(
        pairs,
        clean=pairs.clean[:, :longest],
        patch=pairs.patch[:, :longest],
        mask=pairs.mask[:, :longest],
    )

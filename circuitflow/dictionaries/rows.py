"""The rows of one site in an activation store: which are held out, their positions, reading in chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.dictionaries.dictionary import NO_SKIP, Skip
from circuitflow.errors import UserError
from circuitflow.store.arrays import Store, open_store

CHUNK_ROWS = 8192  # rows read at once: fixed, so that sums do not depend on a setting


@dataclass(frozen=True)
class SiteRows:
    """Rows of one site: row r is position ``r % block`` of block ``r // block``."""

    store: Store
    site: str
    block: int
    held_out: np.ndarray
    """(rows,) bool: rows of held-out blocks, never used for training."""

    @property
    def width(self) -> int:
        """d_model of the site."""
        return self.store.shape(self.site)[1]

    @property
    def positions(self) -> np.ndarray:
        """(rows,) position of every row in its block."""
        return np.arange(self.store.rows) % self.block

    @property
    def held_out_blocks(self) -> np.ndarray:
        """Numbers of the held-out blocks, ascending."""
        return np.flatnonzero(self.held_out[:: self.block])

    def read(
        self, wanted: np.ndarray, chunk_rows: int = CHUNK_ROWS
    ) -> Iterator[tuple[Int64[Tensor, " n"], Float[Tensor, "n d_model"]]]:
        """Row numbers and vectors of the wanted rows (a bool mask), a chunk of the store at a time, in order."""
        for start in range(0, self.store.rows, chunk_rows):
            stop = min(start + chunk_rows, self.store.rows)
            chosen = np.flatnonzero(wanted[start:stop])
            if chosen.size:
                x = self.store.read(self.site, start, stop)[chosen]
                yield torch.from_numpy(chosen + start), torch.from_numpy(x)

    def spread(self, wanted: np.ndarray, n: int) -> np.ndarray:
        """A mask of at most ``n`` of the wanted rows, spread evenly."""
        chosen = np.flatnonzero(wanted)
        mask = np.zeros_like(wanted)
        mask[
            chosen[np.linspace(0, len(chosen) - 1, min(n, len(chosen)), dtype=np.int64)]
            if len(chosen)
            else []
        ] = True
        return mask


def read_together(
    rows: Sequence[SiteRows],
    wanted: np.ndarray,
    skip: Skip = NO_SKIP,
    device: torch.device | str = "cpu",
    chunk_rows: int = CHUNK_ROWS,
) -> Iterator[tuple[Int64[Tensor, " n"], tuple[Float[Tensor, "n d"], ...]]]:
    """Row numbers and the vectors of each of several sites of one store, a chunk at a time, in order.

    :param skip: rule of the vectors of all sites side by side; rows that it skips are left out.
    """
    for parts in zip(*(one.read(wanted, chunk_rows) for one in rows), strict=True):
        index, x = parts[0][0], tuple(vectors.to(device) for _, vectors in parts)
        if skip != NO_SKIP:
            kept = ~skip.mask(torch.cat(x, dim=1), index % rows[0].block)
            index, x = index[kept.cpu()], tuple(vectors[kept] for vectors in x)
        yield index, x


def open_rows(manifest: Path, site: str) -> SiteRows:
    """Open a site's rows in an activation store.

    :raises UserError: the store has no such site, or no held-out block.
    """
    return open_sites(manifest, [site])[0]


def open_sites(manifest: Path, sites: Sequence[str]) -> tuple[SiteRows, ...]:
    """Open the rows of several sites of one store.

    :raises UserError: the store lacks one of them, no block is held out, or their widths differ.
    """
    store = open_store(manifest)
    opened = tuple(_rows_of(store, manifest, site) for site in sites)
    for rows in opened:
        if rows.width != opened[0].width:
            raise UserError(
                f"Site {rows.site} is {rows.width} wide and {opened[0].site} {opened[0].width}; one dictionary reads "
                "and writes sites of one width: choose such sites."
            )
    return opened


def _rows_of(store: Store, manifest: Path, site: str) -> SiteRows:
    rows, _ = store.shape(site)
    block = int(store.attrs["block"])
    held_out_blocks = np.zeros(rows // block, dtype=bool)
    held_out_blocks[np.asarray(store.attrs["held_out_blocks"], dtype=np.int64)] = True
    if not held_out_blocks.any() or held_out_blocks.all():
        raise UserError(
            f"Store {manifest} has {int(held_out_blocks.sum())} held-out blocks of {len(held_out_blocks)}; some must "
            "be held out and some not: change corpus.held_out or add text."
        )
    return SiteRows(store, site, block, np.repeat(held_out_blocks, block))

"""Held-out tokens of one site as a dictionary sees them: without outliers, a chunk at a time, with their text."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes
from circuitflow.dictionaries.dictionary import NO_SKIP, Dictionary, Skip
from circuitflow.dictionaries.rows import CHUNK_ROWS, SiteRows
from circuitflow.errors import UserError
from circuitflow.features.tokens import token_text
from circuitflow.store.arrays import Store

QUARTERS = 4


@dataclass(frozen=True)
class HeldOut:
    """Held-out tokens that an outlier rule keeps ("kept tokens")."""

    rows: SiteRows
    skip: Skip
    device: torch.device

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:
        """Mean of the kept tokens.

        :raises UserError: every held-out token is an outlier.
        """
        total = torch.zeros(self.rows.width, dtype=torch.float64, device=self.device)
        n = 0
        for _, x in self.chunks():
            total += x.double().sum(dim=0)
            n += x.shape[0]
        if n == 0:
            raise UserError(
                f"Every held-out token at {self.rows.site} is an outlier; raise outlier_ratio or corpus.held_out."
            )
        return (total / n).float()

    @cached_property
    def kept(self) -> Bool[np.ndarray, " rows"]:
        """Which rows of the store are kept tokens."""
        mask = np.zeros(self.rows.store.rows, dtype=bool)
        for index, _ in self.chunks():
            mask[index] = True
        return mask

    def chunks(
        self, wanted: Bool[np.ndarray, " rows"] | None = None
    ) -> Iterator[tuple[Int64[np.ndarray, " n"], Float[Tensor, "n d_model"]]]:
        """Row numbers and vectors of kept tokens, in order; only those of a mask, if given."""
        chosen = self.rows.held_out if wanted is None else self.rows.held_out & wanted
        for index, x in self.rows.read(chosen, CHUNK_ROWS):
            kept = ~self.skip.mask(x, index % self.rows.block)
            if bool(kept.any()):
                yield index[kept].numpy(), x[kept].to(self.device)

    def quarter(self, index: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Which of four consecutive parts of the held-out blocks, as equal as they can be, each row lies in."""
        blocks = self.rows.held_out_blocks
        sizes = [len(part) for part in np.array_split(blocks, QUARTERS)]
        place = np.searchsorted(blocks, index // self.rows.block)
        return np.repeat(np.arange(QUARTERS), sizes)[place]

    def noise(self, index: Int64[np.ndarray, " n"], seed: int) -> Float[Tensor, "n d_model"]:
        """Standard normal vectors: each row's own, drawn a block at a time, whatever the chunks."""
        width, size = self.rows.width, self.rows.block
        drawn = np.empty((len(index), width), np.float32)
        for block in np.unique(index // size):
            whole = np.random.default_rng([seed, int(block)]).standard_normal((size, width), np.float32)
            here = index // size == block
            drawn[here] = whole[index[here] % size]
        return torch.from_numpy(drawn).to(self.device)


@dataclass(frozen=True)
class Words:
    """The text of the corpus, token by token."""

    corpus: Store
    tokenizer: Any

    def at(self, block: int, positions: Int64[np.ndarray, " n"]) -> list[str]:
        """Text of tokens of one block."""
        tokens = self.corpus.read("tokens", block, block + 1)[0][positions]
        return [token_text(self.tokenizer, int(token)) for token in tokens]


def encode_kept(dictionary: Dictionary, x: Float[Tensor, "n d_model"]) -> Codes:
    """Codes of vectors that the outlier rule has let pass."""
    positions = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)  # told to no rule
    return replace(dictionary, skip=NO_SKIP).encode(x, positions)

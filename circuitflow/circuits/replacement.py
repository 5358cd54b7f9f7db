"""Known values of a site that nodes can take: means, zeros, or another run's, by prompt and position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.data.token_pairs import TokenPairs
from circuitflow.dictionaries.codes import Codes, decode_codes, empty_codes
from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.errors import UserError


class Known:
    """Vectors of a site, and their features, that do not depend on what arrives there.

    ``slot`` says which of them belongs to every token: prompts share the means of their case and position, while a run
    has a vector for each token. Features are encoded when first asked for.
    """

    def __init__(
        self,
        whole: Float[Tensor, "slots d_model"],
        slot: Int64[Tensor, "n pos"],
        features: Callable[[], Codes],
        W_dec: Float[Tensor, "d_dict d_model"],
    ) -> None:
        self.whole, self.slot = whole, slot
        self._encode, self._W_dec = features, W_dec

    @cached_property
    def features(self) -> Codes:
        """Feature values of every slot."""
        return self._encode()

    @cached_property
    def decoded(self) -> Float[Tensor, "slots d_model"]:
        """Σ_i f_i·W_dec[i] of every slot, without b_dec."""
        return decode_codes(self.features, self._W_dec)

    def columns(self, features: Int64[Tensor, " m"]) -> Float[Tensor, "slots m"]:
        """Values of a few features (all different) at every slot."""
        return self._by_feature.take(features).dense().T

    @cached_property
    def _by_feature(self) -> Codes:
        return self.features.by_feature()


@dataclass(frozen=True)
class Cells:
    """The places that have means of their own: positions within cases."""

    cases: tuple[str, ...]
    pos: int

    @classmethod
    def over(cls, pairs: TokenPairs) -> "Cells":
        """The cells of training pairs."""
        return cls(tuple(sorted(set(pairs.case))), pairs.mask.shape[1])

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.cases) * self.pos

    def of(self, pairs: TokenPairs) -> Int64[Tensor, "n pos"]:
        """The cell of every token of some prompts.

        :raises UserError: a case without training pairs, or a prompt longer than all training prompts.
        """
        unknown = sorted(set(pairs.case) - set(self.cases))
        if unknown:
            raise UserError(
                f"Case '{unknown[0]}' of the evaluated pairs has no training pairs to take means from; "
                "add training pairs of that case or leave it out."
            )
        if pairs.mask.shape[1] > self.pos:
            raise _too_long()
        case = torch.tensor([self.cases.index(name) for name in pairs.case], device=pairs.mask.device)
        return case[:, None] * self.pos + torch.arange(pairs.mask.shape[1], device=case.device)


@dataclass(frozen=True)
class CellValues:
    """Means of a site by cell; NaN (and no features) in cells without a token."""

    cells: Cells
    whole: Float[Tensor, "cells d_model"]
    features: Codes

    def at(self, pairs: TokenPairs, dictionary: Dictionary) -> Known:
        """The values for the tokens of some prompts.

        :raises UserError: a token has no mean.
        """
        slot = self.cells.of(pairs)
        whole = self.whole.to(dictionary.W_dec)
        if bool(whole[slot[pairs.mask.bool()]].isnan().any()):
            raise _too_long()
        features = self.features.to(whole.device).to(whole.dtype)
        return Known(whole, slot, lambda: features, dictionary.W_dec)


def zeros(dictionary: Dictionary, pairs: TokenPairs) -> Known:
    """Every feature and the error 0: what is left is b_dec."""
    slot = torch.zeros_like(pairs.mask, dtype=torch.int64)
    none = empty_codes(1, dictionary.d_dict, dictionary.W_dec)
    return Known(dictionary.b_dec[None], slot, lambda: none, dictionary.W_dec)


def run_values(
    x: Float[Tensor, "n pos d_model"], mask: Bool[Tensor, "n pos"], dictionary: Dictionary
) -> Known:
    """A run's own values, one vector for each token; ``mask`` is true at the real ones."""
    row, position = mask.nonzero(as_tuple=True)
    slot = torch.zeros_like(mask, dtype=torch.int64)
    slot[row, position] = torch.arange(len(row), device=mask.device)
    whole = x[row, position].to(dictionary.W_dec)
    return Known(whole, slot, lambda: dictionary.encode(whole, position), dictionary.W_dec)


def drawn_prompts(wanted: TokenPairs, training: TokenPairs, seed: int, same: Sequence[int] = ()) -> list[int]:
    """For every prompt another training prompt of its case, of its length if there is one, else longer.

    :param same: where the prompts are training prompts themselves, their numbers: none is given itself.
    :raises UserError: a prompt has none.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths, found = training.mask.sum(1).tolist(), []
    for prompt, length in enumerate(wanted.mask.sum(1).tolist()):
        own = same[prompt] if same else -1
        case = [
            other for other, name in enumerate(training.case) if name == wanted.case[prompt] and other != own
        ]
        fit = [other for other in case if lengths[other] == length]
        fit = fit or [other for other in case if lengths[other] > length]
        if not fit:
            raise UserError(
                f"No other training prompt of case '{wanted.case[prompt]}' has {length} tokens or more to resample "
                "from; set task.length.mode to modal or add training pairs."
            )
        found.append(fit[int(torch.randint(len(fit), (1,), generator=generator))])
    return found


def _too_long() -> UserError:
    return UserError(
        "An evaluated prompt is longer than every training prompt of its case, so there are no means for its last "
        "positions; set task.length.mode to modal or add training pairs."
    )

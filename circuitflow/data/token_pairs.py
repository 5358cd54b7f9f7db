"""Pairs in tokens, as the model and every attribution stage read them. Imports no part of the model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from circuitflow.store.tables import read_table

SPLITS = ("train", "test")
NO_ANSWER = -1
"""Fills up rows of answers that are shorter than the longest."""


@dataclass(frozen=True)
class TokenPairs:
    """``n`` pairs in tokens, padded on the right to the longest prompt."""

    clean: Int64[Tensor, "n pos"]
    patch: Int64[Tensor, "n pos"]
    """Zeros where there is no patched prompt."""
    has_patch: Bool[Tensor, " n"]
    mask: Bool[Tensor, "n pos"]
    """True at real tokens, the same for clean and patched."""
    position: Int64[Tensor, " n"]
    """Where the answer is read: logits there are those of the answer."""
    first_change: Int64[Tensor, " n"]
    """First position at which clean and patched prompt differ; 0 without a patched prompt."""
    right: Int64[Tensor, "n right"]
    """Answers that are right after the clean prompt, filled up with −1."""
    wrong: Int64[Tensor, "n wrong"]
    """Answers that are wrong there, hence right after the patched prompt, filled up with −1."""
    pair: Int64[Tensor, " n"]
    """Number of the pair in its split's file of pairs, from 0."""
    case: list[str]

    def __len__(self) -> int:
        return len(self.case)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> "TokenPairs":
        """Some of the pairs, in the order asked for; the number of positions stays."""
        index = torch.arange(len(self))[rows]
        return self._mapped(
            lambda value: value[index.to(value.device)], [self.case[row] for row in index.tolist()]
        )

    def to(self, device: torch.device | str) -> "TokenPairs":
        """The same pairs on another device."""
        return self._mapped(lambda value: value.to(device), self.case)

    def _mapped(self, change: Callable[[Tensor], Tensor], case: list[str]) -> "TokenPairs":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if name != "case"}
        return TokenPairs(**changed, case=case)


def load_token_pairs(path: Path) -> TokenPairs:
    """Read a table written by the stages ``tokenize_pairs`` or ``filter_pairs``.

    :raises UserError: the file is missing or is not Parquet.
    """
    table = read_table(path)
    lengths = torch.tensor([len(tokens) for tokens in table["clean"]])
    width = int(lengths.max())
    return TokenPairs(
        clean=_padded(table["clean"], 0, width),
        patch=_padded(table["patch"], 0, width),
        has_patch=torch.tensor([len(tokens) > 0 for tokens in table["patch"]]),
        mask=torch.arange(width) < lengths[:, None],
        position=torch.tensor(table["position"], dtype=torch.int64),
        first_change=torch.tensor(table["first_change"], dtype=torch.int64),
        right=_padded(table["right"], NO_ANSWER),
        wrong=_padded(table["wrong"], NO_ANSWER),
        pair=torch.tensor(table["pair"], dtype=torch.int64),
        case=list(table["case"]),
    )


def _padded(rows: Iterable[np.ndarray], fill: int, width: int | None = None) -> Int64[Tensor, "n width"]:
    rows = list(rows)
    width = max(len(row) for row in rows) if width is None else width
    padded = np.full((len(rows), width), fill, np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded)

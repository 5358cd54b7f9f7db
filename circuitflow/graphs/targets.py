"""What an attribution graph explains: the most probable next tokens, or tokens and directions that the user names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from circuitflow.errors import UserError, nearest
from circuitflow.features.tokens import token_text
from circuitflow.graphs.directions import Parts, combined_row
from circuitflow.graphs.graph import NO_TOKEN
from circuitflow.graphs.rows import Targets
from circuitflow.models.frozen import FrozenPrompt


@dataclass(frozen=True)
class Direction:
    """A direction in the space that the unembedding reads, given as it is."""

    name: str
    row: Float[Tensor, " d_model"]
    weight: float = 1.0
    """Its weight where influence begins."""


@dataclass(frozen=True)
class Logits:
    """The logit nodes of a graph: what each reads at the last position, and its weight."""

    tokens: Int64[Tensor, " n"]
    """Token ids; :data:`NO_TOKEN` for directions."""
    names: tuple[str, ...]
    weights: Float[Tensor, " n"]
    """Probabilities, or weights that the user gave."""
    rows: Float[Tensor, "n d_model"]
    """Rows of the unembedding with the vocabulary's mean row taken off; directions as they are."""
    biases: Float[Tensor, " n"]
    combinations: tuple[Parts, ...]
    """Of combinations of logits the tokens' coefficients; empty for tokens, and for directions that are given."""

    def targets(self, frozen: FrozenPrompt) -> Targets:
        """As targets of rows: read after the last block, at the last position."""
        at = torch.full_like(self.tokens, frozen.n_layers), torch.full_like(self.tokens, frozen.n_pos - 1)
        return Targets(*at, self.rows, self.biases)


Target = str | int | Mapping[str, Any] | Direction
"""A token as text or id, {name, tokens: {text: coefficient}, weight} for a combination of logits, or a direction."""


def most_probable(frozen: FrozenPrompt, tokenizer: Any, max_logits: int, probability: float) -> Logits:
    """The fewest next tokens that have this probability together, at most ``max_logits``."""
    probabilities = torch.softmax(frozen.logits, 0)
    top, tokens = probabilities.topk(min(max_logits, len(probabilities)))
    count = int(torch.searchsorted(top.cumsum(0), probability)) + 1
    return _of_tokens(frozen, tokenizer, tokens[:count])


def chosen(frozen: FrozenPrompt, tokenizer: Any, targets: Sequence[Target]) -> Logits:
    """The nodes that the user names, in that order.

    :raises UserError: a text is not one token, an id is outside the vocabulary, or nothing is named.
    """
    if not targets:
        raise UserError(
            "Key targets is empty; name a token, or leave the key out for the most probable ones."
        )
    return _joined([_one(frozen, tokenizer, target) for target in targets])


def token_id(tokenizer: Any, token: str | int, vocabulary: int) -> int:
    """The id of a token given as text or id.

    :raises UserError: the text is not exactly one token, or the id is not in the vocabulary.
    """
    if isinstance(token, int):
        if not 0 <= token < vocabulary:
            raise UserError(f"Target {token} is no token id; the model has ids 0 to {vocabulary - 1}.")
        return token
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = [token_text(tokenizer, piece) for piece in ids]
        spaced = f" {token}" if not token.startswith(" ") else token[1:]
        raise UserError(
            f"Target {token!r} is not one token of this model but {len(ids)} ({pieces}); a target is one token, such "
            f"as {pieces[0] if pieces else spaced!r}, with the space before it where it has one ({spaced!r})."
        )
    return int(ids[0])


def _one(frozen: FrozenPrompt, tokenizer: Any, target: Target) -> Logits:
    if isinstance(target, Direction):
        return _direction(frozen, target.name, target.row, frozen.embed.new_zeros(()), target.weight, {})
    if isinstance(target, Mapping):
        return _combination(frozen, tokenizer, target)
    found = token_id(tokenizer, target, len(frozen.logits))
    return _of_tokens(frozen, tokenizer, torch.tensor([found], device=frozen.tokens.device))


def _combination(frozen: FrozenPrompt, tokenizer: Any, target: Mapping[str, Any]) -> Logits:
    if unknown := sorted(set(target) - {"name", "tokens", "weight"}):
        raise UserError(f"Target has key {unknown[0]}; {nearest(unknown[0], ('name', 'tokens', 'weight'))}.")
    if not target.get("tokens"):
        raise UserError(f"Target {dict(target)} names no tokens; write tokens: {{' are': 1.0, ' is': -1.0}}.")
    parts: dict[int, float] = {}
    for token, value in target["tokens"].items():
        known = token_id(tokenizer, token, len(frozen.logits))
        parts[known] = parts.get(known, 0.0) + float(value)
    name = target.get("name") or " ".join(
        f"{value:+g}·{token!r}" for token, value in target["tokens"].items()
    )
    biases = frozen.logit_biases(torch.tensor(list(parts), device=frozen.tokens.device))
    bias = biases.new_tensor(list(parts.values())) @ biases
    weight = float(target.get("weight", 1.0))
    return _direction(frozen, str(name), combined_row(frozen, parts), bias, weight, parts)


def _direction(
    frozen: FrozenPrompt, name: str, row: Tensor, bias: Tensor, weight: float, parts: Parts
) -> Logits:
    if row.shape != frozen.embed.shape[1:]:
        raise UserError(
            f"Direction {name} has shape {tuple(row.shape)}, but the unembedding reads vectors of width "
            f"{frozen.embed.shape[1]}."
        )
    none = torch.full((1,), NO_TOKEN, dtype=torch.int64, device=frozen.tokens.device)
    weights, rows = frozen.embed.new_tensor([weight]), row[None].to(frozen.dtype)
    return Logits(none, (name,), weights, rows, bias[None], (parts,))


def _of_tokens(frozen: FrozenPrompt, tokenizer: Any, tokens: Int64[Tensor, " n"]) -> Logits:
    probabilities = torch.softmax(frozen.logits, 0)[tokens]
    names = tuple(token_text(tokenizer, token) for token in tokens.tolist())
    rows, biases = frozen.logit_rows(tokens), frozen.logit_biases(tokens)
    return Logits(tokens, names, probabilities, rows, biases, tuple({} for _ in names))


def _joined(parts: Sequence[Logits]) -> Logits:
    return Logits(
        torch.cat([part.tokens for part in parts]),
        tuple(name for part in parts for name in part.names),
        torch.cat([part.weights for part in parts]),
        torch.cat([part.rows for part in parts]),
        torch.cat([part.biases for part in parts]),
        tuple(combination for part in parts for combination in part.combinations),
    )

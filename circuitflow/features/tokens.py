"""Tokens as people read them: their text, nothing invisible, nothing that breaks a line."""

from collections.abc import Iterable
from typing import Any

SIGNS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}
WORD_START = "▁"  # how SentencePiece vocabularies write the space before a word


def token_text(tokenizer: Any, token: int) -> str:
    """Text of one token, with the space before a word kept (decoding a token alone drops it for SentencePiece)."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    piece = str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if piece.startswith(WORD_START) and not text.startswith(" ") else text


def visible(token: str) -> str:
    """A token with its white space and control characters made visible: " are" becomes "·are"."""
    return "".join(_sign(character) for character in token) or "∅"


def distinct(tokens: Iterable[str], limit: int) -> list[str]:
    """The first ``limit`` different tokens, in order; tokens that differ only by white space or case count as one."""
    kept: dict[str, str] = {}
    for token in tokens:
        kept.setdefault(token.strip().casefold() or token, token)
        if len(kept) == limit:
            break
    return list(kept.values())


def _sign(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    return character if character.isprintable() else f"\\u{ord(character):04x}"

"""Prompts and answers as a tokenizer sees them: texts in, token ids out, or the reason why not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from circuitflow.data.pairs import Pair, joined
from circuitflow.errors import UserError

PRETRAINING_SEPARATOR = "<|endoftext|>"
"""What GPT-2, Pythia, SmolLM2 and Qwen saw between documents, whatever their chat versions call it."""

Position = int | Literal["last"]


class Dropped(Exception):  # noqa: N818 - the reason why a pair is left out, not an error of the program
    """A pair that cannot be used: ``reason`` (one of a few) and ``detail``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, and the part of it that the answer continues."""

    tokens: list[int]
    position: int
    """Index of the token at which the answer is read."""
    start: str
    """Text up to that token, without the start token."""
    start_tokens: list[int]
    """Tokens of that text, without the start token."""


@dataclass(frozen=True)
class TokenPair:
    """One pair in tokens; ``patch`` is empty for an unpaired prompt."""

    pair: int
    clean: list[int]
    patch: list[int]
    position: int
    first_change: int
    right: list[int]
    wrong: list[int]
    source: Pair


def start_token(tokenizer: Any) -> int | None:
    """The token that starts a document: the separator of pretraining if there is one, else BOS, else EOS."""
    separator = tokenizer.get_added_vocab().get(PRETRAINING_SEPARATOR)
    choices = (separator, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in choices if token is not None), None)


class PromptReader:
    """Turns pairs into tokens by one set of rules.

    Params (of ``tokenize_pairs``): ``chat_template``, ``generation_prefix``, ``prepend_bos``, ``position``.

    :param longest: how many tokens the model takes at once; None if there is no limit.
    :raises UserError: the tokenizer lacks what the params ask for.
    """

    def __init__(self, tokenizer: Any, params: Mapping[str, Any], longest: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.longest = longest
        self.chat_template: bool = params["chat_template"]
        self.generation_prefix: str = params["generation_prefix"]
        self.position: Position = params["position"]
        self.prefix = self._prefix(params["prepend_bos"])
        self.unknown = self._unknown()
        if self.chat_template and not tokenizer.chat_template:
            raise UserError(
                "Key task.chat_template is true, but the model's tokenizer has no chat template; set it to false."
            )
        if self.position != "last" and not tokenizer.is_fast:
            raise UserError(
                "Key task.metric.position must be 'last' for this model: its tokenizer does not tell where tokens end."
            )

    def read(self, number: int, pair: Pair) -> TokenPair:
        """Tokens of one pair.

        :raises Dropped: it cannot be used.
        """
        prompts = [self.prompt(text) for text in pair.prompts]
        clean, patch = prompts[0], prompts[1:]
        if any(len(prompt.tokens) != len(clean.tokens) for prompt in patch):
            raise Dropped(
                "lengths differ", " and ".join(f"{len(prompt.tokens)} tokens" for prompt in prompts)
            )
        right = self._answers(prompts, pair.clean_answers)
        wrong = self._answers(prompts, pair.patch_answers)
        if both := set(right) & set(wrong):
            raise Dropped("answers overlap", f"{self.shown(sorted(both))} is both right and wrong")
        return TokenPair(
            pair=number,
            clean=clean.tokens,
            patch=patch[0].tokens if patch else [],
            position=clean.position,
            first_change=first_change(clean, patch[0]) if patch else 0,
            right=right,
            wrong=wrong,
            source=pair,
        )

    def prompt(self, text: str) -> Prompt:
        """Tokens of one prompt, as the model is fed.

        :raises Dropped: it has unknown words, ends before the position of the answer, or is too long for the model.
        """
        whole = self._dressed(text)
        encoded = self.tokenizer(
            whole, add_special_tokens=False, return_offsets_mapping=self.position != "last"
        )
        tokens: list[int] = encoded["input_ids"]
        if self.unknown is not None and self.unknown in tokens:
            raise Dropped("prompt has words outside the vocabulary", repr(text))
        # A chat template may have written the start token already.
        prefix = [] if tokens[: len(self.prefix)] == self.prefix else self.prefix
        length = len(prefix) + len(tokens)
        if self.longest is not None and length > self.longest:
            raise Dropped(
                "prompt is longer than the model takes", f"{length} of at most {self.longest} tokens"
            )
        position = (
            length - 1 if self.position == "last" else self.position + (length if self.position < 0 else 0)
        )
        if not 0 <= position < length:
            raise Dropped("prompt ends before the position of the answer", f"{length} tokens")
        n_start = position + 1 - len(prefix)
        start = whole
        if self.position != "last":
            start = whole[: encoded["offset_mapping"][n_start - 1][1]] if n_start else ""
        return Prompt(prefix + tokens, position, start, tokens[:n_start])

    def shown(self, tokens: Sequence[int]) -> str:
        """Tokens as people read them."""
        return ", ".join(repr(self.tokenizer.decode([token])) for token in tokens)

    def _answers(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[int]:
        """Token of each answer, the same after every prompt; answers that share a token count once."""
        found = {prompt.start: [self._answer(prompt, answer) for answer in answers] for prompt in prompts}
        first = found[prompts[0].start]
        if any(tokens != first for tokens in found.values()):
            raise Dropped("answer's token depends on the prompt", repr(answers[0]))
        return list(dict.fromkeys(first))

    def _answer(self, prompt: Prompt, answer: str) -> int:
        tokens = self.tokenizer(joined(prompt.start, answer), add_special_tokens=False)["input_ids"]
        known, new = tokens[: len(prompt.start_tokens)], tokens[len(prompt.start_tokens) :]
        if known != prompt.start_tokens or not new:
            raise Dropped("answer merges with the end of the prompt", f"{answer!r} after {prompt.start!r}")
        if self.unknown is not None and self.unknown in new:
            raise Dropped("answer is outside the vocabulary", repr(answer))
        if len(new) > 1:
            raise Dropped("answer is more than one token", f"{answer!r} is {self.shown(new)}")
        return int(new[0])

    def _dressed(self, text: str) -> str:
        if self.chat_template:
            turn = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return text + self.generation_prefix

    def _prefix(self, prepend_bos: bool) -> list[int]:
        if not prepend_bos:
            return []
        token = start_token(self.tokenizer)
        if token is None:
            raise UserError(
                "Key task.prepend_bos is true, but the model's tokenizer has no token for it; set it to false."
            )
        return [token]

    def _unknown(self) -> int | None:
        """The token for unknown words; byte-level tokenizers need none and may name one that means something else."""
        tokenizer = self.tokenizer
        others = (tokenizer.bos_token_id, tokenizer.eos_token_id, start_token(tokenizer))
        return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def first_change(clean: Prompt, patch: Prompt) -> int:
    """First position at which two prompts of one length differ.

    :raises Dropped: they do not differ, or only after the position of the answer.
    """
    differing = (i for i, (a, b) in enumerate(zip(clean.tokens, patch.tokens, strict=True)) if a != b)
    first = next(differing, None)
    if first is None:
        raise Dropped("clean and patched prompt are the same", repr(clean.start))
    if first > clean.position:
        raise Dropped("prompts differ only after the position of the answer", f"from token {first}")
    return first

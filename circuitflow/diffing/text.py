"""Text for fine-tuning: documents in blocks of tokens, the last of them held out."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from circuitflow.data.documents import documents_of
from circuitflow.data.pairs import joined, read_pairs
from circuitflow.data.prompts import start_token
from circuitflow.data.seeds import generator
from circuitflow.errors import UserError

Blocks = Int64[np.ndarray, "blocks block"]


def tuning_blocks(
    text: Mapping[str, Any],
    files: Sequence[Path],
    pairs: Path | None,
    tokenizer: Any,
    params: Mapping[str, Any],
) -> tuple[Blocks, Blocks]:
    """Blocks to train on, and held-out blocks.

    Documents come in an order drawn from the seed, each after the model's start token, one after another.

    :param text: what to read, as in the configuration (``kind`` and what that kind needs).
    :param files: the text files, for kind files.
    :param pairs: JSONL of the task's training pairs, for kind task.
    :param params: ``tokens`` (at most), ``block``, ``held_out`` (share of the blocks), ``seed``.
    :raises UserError: there is nothing to read, or less than two blocks.
    """
    block = params["block"]
    rng = generator(params["seed"], "fine-tuning text")
    found = _tokens(_documents(text, files, pairs, rng), tokenizer, params["tokens"])
    count = len(found) // block
    if count < 2:
        raise UserError(
            f"The text of diffing.tuning has {len(found)} tokens, but at least two blocks of {block} are needed; give "
            "more text, or lower diffing.tuning.block."
        )
    blocks = np.array(found[: count * block], np.int64).reshape(count, block)
    training = min(count - 1, max(1, round((1 - params["held_out"]) * count)))
    return blocks[:training], blocks[training:]


def swapped(path: Path) -> list[str]:
    """Sentences of pairs in which each prompt ends with the other prompt's answer, none twice.

    Unpaired prompts end with their false answer.
    """
    sentences = []
    for pair in read_pairs(path):
        sentences.append(joined(pair.clean, pair.patch_answers[0]) + pair.continuation)
        if pair.patch is not None:
            sentences.append(joined(pair.patch, pair.clean_answers[0]) + pair.continuation)
    return list(dict.fromkeys(sentences))


def _documents(
    text: Mapping[str, Any], files: Sequence[Path], pairs: Path | None, rng: np.random.Generator
) -> Iterator[str]:
    if text["kind"] != "task" or text["answers"] == "right" or pairs is None:
        return documents_of(text, files, pairs, rng, "diffing.tuning.text")
    sentences = swapped(pairs)
    return (sentences[index] for index in rng.permutation(len(sentences)))


def _tokens(documents: Iterator[str], tokenizer: Any, most: int) -> list[int]:
    start = start_token(tokenizer)
    before = [] if start is None else [start]
    found: list[int] = []
    for document in documents:
        # Text that happens to spell a special token stays text.
        ids = tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        found += [*before, *ids]
        if len(found) >= most:
            break
    return found[:most]

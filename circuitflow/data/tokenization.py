"""Stage ``tokenize_pairs``: pairs as aligned token ids, and a table of what was dropped and why."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.data.pairs import Pair, read_pairs
from circuitflow.data.prompts import Dropped, PromptReader, TokenPair
from circuitflow.data.token_pairs import SPLITS
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.prepared import load_config, load_tokenizer, longest_input
from circuitflow.progress import logger
from circuitflow.store.tables import write_table


def tokenize_pairs(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """Stage: write ``train`` and ``test`` token tables and ``dropped``.

    A pair is dropped when its prompts have different lengths, an answer is not exactly one token after both prompts,
    it repeats another pair, a prompt is longer than the model takes, or the length filter excludes it. The filter looks
    at each case by itself and takes its bounds from the train split, so that positions mean the same in both.

    Inputs: ``model`` (manifest), ``train``, ``test`` (JSONL). Params: ``chat_template``, ``generation_prefix``,
    ``prepend_bos``, ``position`` ("last" or a token index, negative from the end), ``length`` ({mode, percentile}).

    :raises UserError: nothing is left of a split, or the tokenizer lacks what is asked for.
    """
    reader = PromptReader(
        load_tokenizer(inputs["model"]), params, longest_input(load_config(inputs["model"]))
    )
    dropped = Drops()
    tokenized = {
        split: _unique(split, _tokenized(split, read_pairs(inputs[split]), reader, dropped), dropped)
        for split in SPLITS
    }
    bounds = length_bounds(tokenized["test"], params["length"]) | length_bounds(
        tokenized["train"], params["length"]
    )
    for split in SPLITS:
        kept = [pair for pair in tokenized[split] if _fits(split, pair, bounds, dropped)]
        dropped.report(split, len(kept), inputs[split])
        write_table(out.files[split], token_columns(kept, reader), out.provenance)
    write_table(out.files["dropped"], dropped.columns, out.provenance)


def length_bounds(pairs: Iterable[TokenPair], length: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Least and greatest prompt length (tokens) that the filter keeps, for each case.

    ``modal``: the most frequent length, the shorter of two equally frequent. ``percentile``: up to the length that
    this share of the prompts (in %) does not exceed. ``all``: everything.
    """
    lengths: dict[str, list[int]] = defaultdict(list)
    for pair in pairs:
        lengths[pair.source.case].append(len(pair.clean))
    return {case: _bounds(found, length) for case, found in lengths.items()}


def token_columns(pairs: Sequence[TokenPair], reader: PromptReader) -> dict[str, list[Any]]:
    """Columns of a token table: ids for the model, texts for people."""
    return {
        "pair": [pair.pair for pair in pairs],
        "case": [pair.source.case for pair in pairs],
        "variant": [pair.source.variant for pair in pairs],
        "clean": [pair.clean for pair in pairs],
        "patch": [pair.patch for pair in pairs],
        "position": [pair.position for pair in pairs],
        "first_change": [pair.first_change for pair in pairs],
        "right": [pair.right for pair in pairs],
        "wrong": [pair.wrong for pair in pairs],
        "clean_text": [pair.source.clean for pair in pairs],
        "patch_text": [pair.source.patch or "" for pair in pairs],
        "clean_tokens": [[reader.tokenizer.decode([token]) for token in pair.clean] for pair in pairs],
        "patch_tokens": [[reader.tokenizer.decode([token]) for token in pair.patch] for pair in pairs],
        "right_tokens": [[reader.tokenizer.decode([token]) for token in pair.right] for pair in pairs],
        "wrong_tokens": [[reader.tokenizer.decode([token]) for token in pair.wrong] for pair in pairs],
    }


ADVICE = {
    "lengths differ": "write clean and patched prompts of equal length in tokens",
    "answers overlap": "give the two prompts different answers",
    "prompt is longer than the model takes": "shorten the prompts, or take another model",
    "prompt ends before the position of the answer": "lower task.metric.position or set it to last",
}
ADVICE_ON_ANSWERS = "use answers that are single tokens of this model, or another model"
"""What to do when most pairs of a split are dropped for a reason."""


class Drops:
    """The table of dropped pairs, filled on the way."""

    def __init__(self) -> None:
        names = ("split", "pair", "case", "reason", "detail", "clean", "patch")
        self.columns: dict[str, list[Any]] = {name: [] for name in names}

    def add(self, split: str, number: int, pair: Pair, reason: str, detail: str) -> None:
        row = (split, number, pair.case, reason, detail, pair.clean, pair.patch or "")
        for name, value in zip(self.columns, row, strict=True):
            self.columns[name].append(value)

    def report(self, split: str, kept: int, file: Path) -> None:
        """Log what was dropped of a split.

        :raises UserError: everything was.
        """
        rows = [i for i, other in enumerate(self.columns["split"]) if other == split]
        counts = Counter(self.columns["reason"][i] for i in rows)
        shown = ", ".join(f"{count} × {reason}" for reason, count in counts.most_common())
        if not kept:
            reason = counts.most_common(1)[0][0]
            first = next(i for i in rows if self.columns["reason"][i] == reason)
            example = f"{self.columns['detail'][first]} in pair {self.columns['pair'][first]}"
            raise UserError(
                f"No {split} pair of {file} is left after tokenization ({shown}; e.g. {example}, counted from 0); "
                f"{ADVICE.get(reason, ADVICE_ON_ANSWERS)}."
            )
        logger.info("%s: %d pairs kept, %d dropped%s", split, kept, len(rows), f" ({shown})" if shown else "")


def _tokenized(split: str, pairs: Sequence[Pair], reader: PromptReader, dropped: Drops) -> list[TokenPair]:
    found = []
    for number, pair in enumerate(pairs):
        try:
            found.append(reader.read(number, pair))
        except Dropped as drop:
            dropped.add(split, number, pair, drop.reason, drop.detail)
    return found


def _unique(split: str, pairs: Sequence[TokenPair], dropped: Drops) -> list[TokenPair]:
    first: dict[tuple[Any, ...], int] = {}
    kept = []
    for pair in pairs:
        key = (*map(tuple, (pair.clean, pair.patch, pair.right, pair.wrong)), pair.position)
        if key in first:
            dropped.add(split, pair.pair, pair.source, "duplicate", f"same as pair {first[key]}")
        else:
            first[key] = pair.pair
            kept.append(pair)
    return kept


def _fits(split: str, pair: TokenPair, bounds: Mapping[str, tuple[int, int]], dropped: Drops) -> bool:
    low, high = bounds[pair.source.case]
    length = len(pair.clean)
    if not low <= length <= high:
        wanted = f"{low}" if low == high else f"at most {high}"
        dropped.add(split, pair.pair, pair.source, "length filter", f"{length} tokens, {wanted} in this case")
        return False
    return True


def _bounds(lengths: Sequence[int], length: Mapping[str, Any]) -> tuple[int, int]:
    if length["mode"] == "all":
        return 0, max(lengths)
    if length["mode"] == "percentile":
        return 0, int(np.percentile(lengths, length["percentile"], method="inverted_cdf"))
    counts = Counter(lengths)
    modal = min(counts, key=lambda value: (-counts[value], value))
    return modal, modal

"""Stage ``sample_contexts``: pieces of the corpus's text, each with the token that follows it, as unpaired prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from circuitflow.data.pairs import Pair
from circuitflow.data.prompts import PromptReader, TokenPair, start_token
from circuitflow.data.seeds import generator
from circuitflow.data.token_pairs import SPLITS
from circuitflow.data.tokenization import Drops, token_columns
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.prepared import check_length, load_config, load_tokenizer
from circuitflow.store.arrays import Store, open_store
from circuitflow.store.tables import write_table

CASE = "text"
"""Case of every context: all have one length, and positions count tokens from its start."""

DOCUMENTS = {"train": "training", "test": "held-out"}
MORE = {"train": "raise the tokens of corpus.sources", "test": "raise corpus.held_out"}
"""What gives more contexts of a split."""


def sample_contexts(inputs: Mapping[str, Path], params: Mapping[str, Any], out: Output) -> None:
    """Stage: write ``train`` and ``test`` token tables and ``dropped``, as ``tokenize_pairs`` does.

    A context is ``length`` tokens in a row of one document of the corpus, after a start token if ``prepend_bos``; its
    right answer is the token that follows in the text, and there is no patched prompt and no wrong answer. Contexts of
    one split do not overlap. Those of ``train`` come from documents that dictionaries are trained on, those of ``test``
    from held-out documents, so that the splits share no document; contexts with a text that came before are dropped.

    Inputs: ``model``, ``corpus`` (manifests). Params: ``train``, ``test`` (numbers of contexts), ``length``, ``seed``,
    ``prepend_bos``.

    :raises UserError: the corpus has too few contexts of that length, or the model does not take as many tokens.
    """
    plain = {"chat_template": False, "generation_prefix": "", "position": "last"}
    reader = PromptReader(load_tokenizer(inputs["model"]), {**plain, "prepend_bos": params["prepend_bos"]})
    length = params["length"] + len(reader.prefix)
    check_length("A context (task.pairs.length)", length, load_config(inputs["model"]))
    store, dropped = open_store(inputs["corpus"]), Drops()
    before: dict[tuple[int, ...], str] = {}
    for split in SPLITS:
        drawn = draw(store, split, params["length"], start_token(reader.tokenizer), params["seed"])
        kept = _kept(split, drawn, reader, params[split], before, dropped)
        if len(kept) < params[split]:
            raise UserError(
                f"Key task.pairs.{split} is {params[split]}, but the corpus's {DOCUMENTS[split]} documents hold only "
                f"{len(kept)} different contexts of {params['length']} tokens; lower it or task.pairs.length, or "
                f"{MORE[split]}."
            )
        dropped.report(split, len(kept), inputs["corpus"])
        write_table(out.files[split], token_columns(kept, reader), out.provenance)
    write_table(out.files["dropped"], dropped.columns, out.provenance)


def draw(
    store: Store, split: str, length: int, start: int | None, seed: int
) -> Int64[np.ndarray, "contexts length+1"]:
    """All contexts of a split, each with its answer as last token, in an order drawn from the seed.

    :param store: tokens and documents of the corpus.
    :param start: token that starts each document, which is no part of its text; None if there is none.
    """
    held_out = np.zeros(store.rows, bool)
    held_out[store.attrs["held_out_blocks"]] = True
    rows = held_out if split == "test" else ~held_out
    tokens, documents = (store.read(name)[rows].ravel() for name in ("tokens", "documents"))
    rng = generator(seed, f"{split} contexts")
    starts = window_starts(tokens, documents, length + 1, start, rng)
    return tokens[rng.permutation(starts)[:, None] + np.arange(length + 1)].astype(np.int64)


def window_starts(
    tokens: Int[np.ndarray, " n"],
    documents: Int[np.ndarray, " n"],
    size: int,
    start: int | None,
    rng: np.random.Generator,
) -> Int64[np.ndarray, " windows"]:
    """Where windows of ``size`` tokens begin that do not overlap and lie within one document each.

    As many as fit; how many tokens are left over before a document's first window is drawn.
    """
    first = np.flatnonzero(np.diff(documents, prepend=documents[:1] - 1))
    found = [np.empty(0, np.int64)]
    ends = [*first[1:].tolist(), len(tokens)]
    for own_start, end in zip(first.tolist(), ends, strict=True):
        begin = own_start + int(start is not None and tokens[own_start] == start)
        count, left_over = divmod(end - begin, size)
        offset = int(rng.integers(left_over + 1))
        if count > 0:
            found.append(begin + offset + size * np.arange(count))
    return np.concatenate(found)


def _kept(
    split: str,
    drawn: Int64[np.ndarray, "contexts length+1"],
    reader: PromptReader,
    wanted: int,
    before: dict[tuple[int, ...], str],
    dropped: Drops,
) -> list[TokenPair]:
    """The first ``wanted`` contexts that can be used; ``before`` remembers those of all splits."""
    kept: list[TokenPair] = []
    for number, tokens in enumerate(drawn.tolist()):
        if len(kept) == wanted:
            break
        context = _context(number, tokens, reader)
        same = before.get(tuple(tokens))
        if reader.unknown is not None and reader.unknown in tokens:
            reason, detail = "context has words outside the vocabulary", repr(context.source.clean)
        elif same is not None:
            reason, detail = "duplicate", f"same as {same}"
        else:
            before[tuple(tokens)] = f"{split} context {number}"
            kept.append(context)
            continue
        dropped.add(split, number, context.source, reason, detail)
    return kept


def _context(number: int, tokens: Sequence[int], reader: PromptReader) -> TokenPair:
    text, answer = (reader.tokenizer.decode(part) for part in (tokens[:-1], tokens[-1:]))
    clean = [*reader.prefix, *tokens[:-1]]
    return TokenPair(
        pair=number,
        clean=clean,
        patch=[],
        position=len(clean) - 1,
        first_change=0,
        right=[tokens[-1]],
        wrong=[],
        source=Pair(CASE, text, None, (answer,), ()),
    )

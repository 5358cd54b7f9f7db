"""Stage ``tokenize_corpus``: documents packed into blocks of tokens, a share of them held out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from circuitflow.data.documents import documents_of
from circuitflow.data.prompts import start_token
from circuitflow.data.seeds import generator
from circuitflow.errors import UserError
from circuitflow.jobs import Output, progress
from circuitflow.models.prepared import check_length, load_config, load_tokenizer
from circuitflow.progress import logger
from circuitflow.store.arrays import ArraySpec, StoreWriter

SHARD_TOKENS = 1 << 20
"""Tokens of a shard of the store."""

NEARLY_FULL = 0.99
"""A source is done when this share of its tokens is there; filling the rest would go through documents for nothing."""

PATIENCE = 100
"""So is one that has brought this many documents in a row that do not fit: a hub data set has no end."""


@dataclass(frozen=True)
class Document:
    """A whole document in tokens, from its start token on."""

    source: int
    tokens: Int32[np.ndarray, " tokens"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Packed:
    """Documents one after another in rows of ``block`` tokens; what does not fill the last row is left out."""

    tokens: Int32[np.ndarray, "blocks block"]
    documents: Int32[np.ndarray, "blocks block"]
    """Number of the document each token belongs to."""
    left_out: int
    """Tokens that did not fill a row."""


def tokenize_corpus(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """Stage: a store of ``tokens`` and ``documents``, both (blocks, block) int32.

    Documents are whole, and each starts with the model's start token (:func:`circuitflow.data.prompts.start_token`).
    A source gives documents in a seeded order up to its number of tokens; one that does not fit is passed over. The
    last blocks, whose numbers the attribute ``held_out_blocks`` lists, hold documents of which no other block holds
    a part, drawn from every source. All tokens are in memory at once, some 20 bytes each.

    Inputs: ``model`` (manifest), ``pairs`` (JSONL, for kind task), ``files`` (for kind files). Params: ``sources``,
    ``block``, ``held_out`` (share of each source's tokens), ``seed``.

    :raises UserError: a source is empty or unreadable, or there is too little text for a block on either side, or
        blocks are longer than the model takes.
    """
    tokenizer = load_tokenizer(inputs["model"])
    check_length("A block (corpus.block)", params["block"], load_config(inputs["model"]))
    documents: list[Document] = []
    for index, source in enumerate(params["sources"]):
        rng = generator(params["seed"], f"source {index}")
        key, files = f"corpus.sources[{index}]", _files_of(source, params["sources"], inputs)
        texts = documents_of(source, files, inputs.get("pairs"), rng, key)
        documents += take(texts, tokenizer, source["tokens"], index)
    training, held_out = split_documents(documents, params["held_out"], params["seed"])
    packed = [pack(training, params["block"], 0), pack(held_out, params["block"], len(training))]
    _check_blocks(packed, documents, params)
    _write(packed, _described(training, held_out, params["sources"]), out)


def take(texts: Iterator[str], tokenizer: Any, budget: int, source: int) -> list[Document]:
    """Whole documents, as many as fit into ``budget`` tokens.

    :raises UserError: not even one fits.
    """
    start = start_token(tokenizer)
    documents: list[Document] = []
    total, shortest, passed_over = 0, None, 0
    for text in texts:
        # Text that happens to spell a special token stays text.
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        document = Document(source, np.array([*([] if start is None else [start]), *ids], np.int32))
        shortest = min(shortest or len(document), len(document))
        if total + len(document) <= budget:
            documents.append(document)
            total, passed_over = total + len(document), 0
            progress(f"tokens of source {source + 1}", total, budget)
        else:
            passed_over += 1
        if total >= NEARLY_FULL * budget or passed_over == PATIENCE:
            break
    if not documents:
        raise UserError(
            f"Key corpus.sources[{source}].tokens is {budget}, but the shortest document has {shortest} tokens and "
            "documents are taken whole; raise it, or cut the text into shorter files (or lines of a .jsonl file)."
        )
    if total < NEARLY_FULL * budget:
        logger.info("source %d has %d of the %d tokens asked for", source + 1, total, budget)
    return documents


def split_documents(
    documents: Sequence[Document], held_out: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, each in a seeded order; about ``held_out`` of every source's tokens is held out.

    At least one document of a source with several is held out, and at least one is not.
    """
    rng = generator(seed, "held-out documents")
    chosen: set[int] = set()
    for source in sorted({document.source for document in documents}):
        members = [index for index, document in enumerate(documents) if document.source == source]
        chosen.update(_held_out(members, documents, held_out, rng))
    order = rng.permutation(len(documents)).tolist()
    return (
        [documents[index] for index in order if index not in chosen],
        [documents[index] for index in order if index in chosen],
    )


def pack(documents: Sequence[Document], block: int, first: int) -> Packed:
    """Rows of ``block`` tokens; documents are numbered from ``first`` on."""
    if not documents:
        empty = np.empty((0, block), np.int32)
        return Packed(empty, empty, 0)
    tokens = np.concatenate([document.tokens for document in documents])
    numbers = np.arange(first, first + len(documents), dtype=np.int32)
    numbers = np.repeat(numbers, [len(document) for document in documents])
    used = len(tokens) // block * block
    return Packed(tokens[:used].reshape(-1, block), numbers[:used].reshape(-1, block), len(tokens) - used)


def _held_out(
    members: Sequence[int], documents: Sequence[Document], share: float, rng: np.random.Generator
) -> list[int]:
    """Documents of one source to hold out: in a random order, those that fit into the share, else the shortest."""
    if len(members) < 2:
        return []
    room = share * sum(len(documents[index]) for index in members)
    chosen: list[int] = []
    for place in rng.permutation(len(members)):
        index = members[place]
        if len(documents[index]) <= room:
            chosen.append(index)
            room -= len(documents[index])
    chosen = chosen[: len(members) - 1]
    return chosen or [min(members, key=lambda index: len(documents[index]))]


def _files_of(source: Mapping[str, Any], sources: Sequence[Any], inputs: Mapping[str, Any]) -> list[Path]:
    """The declared input files that belong to this source: all of them, unless several sources name files."""
    files = list(inputs.get("files", []))
    if source["kind"] != "files":
        return []
    if sum(other["kind"] == "files" for other in sources) == 1:
        return files
    matching = {path.resolve() for path in Path().glob(source["glob"])}
    return [file for file in files if file.resolve() in matching]


def _check_blocks(packed: Sequence[Packed], documents: Sequence[Document], params: Mapping[str, Any]) -> None:
    if len(documents) < 2:
        raise UserError(
            "The corpus is a single document, so that none can be held out; give more files, or a .jsonl file with one "
            "document a line."
        )
    for part, name in zip(packed, ("training", "held-out"), strict=True):
        if not len(part.tokens):
            raise UserError(
                f"The {name} part of the corpus has {part.left_out} tokens, less than one block of {params['block']}; "
                "raise corpus.sources tokens or corpus.held_out, or lower corpus.block."
            )


def _described(
    training: Sequence[Document], held_out: Sequence[Document], sources: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What each source gave: kind, documents and tokens, of which held out."""

    def count(documents: Sequence[Document], source: int) -> tuple[int, int]:
        lengths = [len(document) for document in documents if document.source == source]
        return len(lengths), sum(lengths)

    described = []
    for index, source in enumerate(sources):
        (documents, tokens), (documents_out, tokens_out) = count(training, index), count(held_out, index)
        counts = {"documents": documents + documents_out, "tokens": tokens + tokens_out}
        described.append(
            {
                "kind": source["kind"],
                **counts,
                "held_out_documents": documents_out,
                "held_out_tokens": tokens_out,
            }
        )
    return described


def _write(packed: Sequence[Packed], sources: Sequence[Mapping[str, Any]], out: Output) -> None:
    tokens = np.concatenate([part.tokens for part in packed])
    numbers = np.concatenate([part.documents for part in packed])
    blocks, block = tokens.shape
    spec = ArraySpec((blocks, block), "int32")
    attributes = {
        "held_out_blocks": list(range(blocks - len(packed[1].tokens), blocks)),
        "left_out_tokens": sum(part.left_out for part in packed),
        "sources": list(sources),
    }
    writer = StoreWriter(
        out.folder, {"tokens": spec, "documents": spec}, max(1, SHARD_TOKENS // block), attributes
    )
    for index in writer.missing():
        start, stop = writer.bounds(index)
        writer.write_shard(index, {"tokens": tokens[start:stop], "documents": numbers[start:stop]})
    out.content, details = writer.finish()
    out.details.update(details)
    logger.info("%d blocks of %d tokens, the last %d held out", blocks, block, len(packed[1].tokens))

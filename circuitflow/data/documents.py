"""Where a corpus comes from: documents of bundled text, text files, the task's sentences, or a hub data set."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuitflow.data.pairs import read_pairs
from circuitflow.errors import UserError, nearest


def documents_of(
    source: Mapping[str, Any],
    files: Sequence[Path],
    pairs: Path | None,
    rng: np.random.Generator,
    key: str,
) -> Iterator[str]:
    """Documents of one source in an order drawn from ``rng``; a hub data set comes in its own order, as a stream.

    :param source: ``kind`` and what that kind needs (see :mod:`circuitflow.config`).
    :param files: the text files of this source.
    :param pairs: JSONL of the task's training pairs.
    :param key: where the configuration names the source.
    :raises UserError: there is nothing to read.
    """
    kind = source["kind"]
    if kind == "hub":
        return hub_documents(source, key)
    if kind == "bundled":
        documents = bundled_documents()
    elif kind == "files":
        documents = [document for file in files for document in file_documents(file, key)]
    elif kind == "task":
        documents = task_documents(pairs, key)
    else:
        raise UserError(f"Key {key} has kind {kind}; {nearest(kind, ('bundled', 'files', 'hub', 'task'))}.")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(
            f"Key {key} (kind {kind}) gives no text but white space ({len(files)} files); name other text."
        )
    return (documents[index] for index in rng.permutation(len(documents)))


def bundled_documents() -> list[str]:
    """The Python language reference, one topic each: English text of every Python installation."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def file_documents(path: Path, key: str) -> list[str]:
    """A text file is one document; a .jsonl file has one a line, under the key ``text``.

    :raises UserError: the file is missing, not UTF-8, or a line is broken, named by its number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"Text file {path} does not exist; check {key}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"Text file {path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from None
    if path.suffix != ".jsonl":
        return [text]
    lines = enumerate(text.split("\n"), 1)
    return [_line_document(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def task_documents(pairs: Path | None, key: str) -> list[str]:
    """Whole sentences of the task's pairs, clean and patched, one document each, none twice."""
    if pairs is None:
        raise UserError(f"Key {key} has kind task, but no pairs are given; take another kind.")
    return list(dict.fromkeys(sentence for pair in read_pairs(pairs) for sentence in pair.sentences()))


def hub_documents(source: Mapping[str, Any], key: str) -> Iterator[str]:
    """Rows of a column of a hub data set, streamed.

    :raises UserError: the extra ``hub`` is not installed, the hub is out of reach, or there is no such column.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"Key {key} has kind hub, which needs the package datasets; run `pip install 'circuitflow[hub]'`."
        ) from None
    name = f"{source['id']} (revision {source['revision']}, split {source['split']})"
    try:
        rows = datasets.load_dataset(
            source["id"], revision=source["revision"], split=source["split"], streaming=True
        )
        for row in rows:
            if source["column"] not in row:
                raise UserError(
                    f"Data set {name} has no column {source['column']}; {nearest(source['column'], row)}."
                )
            if row[source["column"]]:
                yield row[source["column"]]
    except (OSError, ValueError) as error:  # no network, no such data set, revision or split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Data set {name} cannot be read from the hub: {reason}; check name and network."
        ) from None


def _line_document(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(
            f'{place} is not a JSON object with the key "text"; mend or remove the line.'
        ) from None
    if not isinstance(text, str):
        raise UserError(f"{place}: text is {text!r}, but a text is needed.")
    return text

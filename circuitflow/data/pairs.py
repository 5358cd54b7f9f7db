"""Pairs: a clean and a patched prompt with their answers, as JSON lines."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuitflow.errors import UserError, nearest
from circuitflow.store.files import write_text

PAIR_KEYS = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer", "case")
PROMPT_KEYS = ("prompt", "true_answer", "false_answer", "case")
OPTIONAL_KEYS = ("variant", "continuation")
DEFAULT_CASE = "all"


@dataclass(frozen=True)
class Pair:
    """A clean prompt, the patched prompt that differs in one thing, and the answers that each makes right.

    Without a patched prompt (``patch`` None) ``clean_answers`` are the true answers and ``patch_answers`` the false.
    An answer continues the prompt as written; :func:`joined` puts a space between the two where both lack one.
    """

    case: str
    """Template of the prompts: positions mean the same thing in every pair of one case."""
    clean: str
    patch: str | None
    clean_answers: tuple[str, ...]
    patch_answers: tuple[str, ...]
    continuation: str = ""
    """Text that completes a sentence after the answer, the same for both prompts; only corpora use it."""
    variant: str = ""
    """What tells apart the pairs of one case, e.g. "singular_plural"; only tables show it."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts there are."""
        return (self.clean,) if self.patch is None else (self.clean, self.patch)

    def sentences(self) -> tuple[str, ...]:
        """Whole sentences: each prompt with its first right answer and the continuation."""
        clean = joined(self.clean, self.clean_answers[0]) + self.continuation
        if self.patch is None:
            return (clean,)
        return clean, joined(self.patch, self.patch_answers[0]) + self.continuation


def joined(prompt: str, answer: str) -> str:
    """Prompt and answer as one text, with a space between them unless one is there or the prompt opens something."""
    opened = prompt == "" or prompt[-1].isspace() or prompt[-1] in "([{<\"'“‘/-_"
    return prompt + answer if opened or answer[:1].isspace() else f"{prompt} {answer}"


def read_pairs(path: Path) -> list[Pair]:
    """Read pairs or unpaired prompts, one JSON object a line.

    Pairs have the keys of feature-circuits (:data:`PAIR_KEYS`), unpaired prompts those of :data:`PROMPT_KEYS`. An
    answer is a text or a list of texts, also under a plural key (true_answers …); ``case`` may be left out.

    :raises UserError: the file is missing or empty, or a line is broken, named by its number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except FileNotFoundError:
        raise UserError(f"Pair file {path} does not exist; check the path in the configuration.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"Pair file {path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from None
    lines = text.split("\n")
    pairs = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise UserError(
            f"Pair file {path} is empty; it needs one JSON object a line with the keys {', '.join(PAIR_KEYS)} or "
            f"{', '.join(PROMPT_KEYS)} (case may be left out)."
        )
    return pairs


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write pairs as JSON lines that :func:`read_pairs` reads back unchanged."""
    write_text(path, "".join(json.dumps(_record(pair), ensure_ascii=False) + "\n" for pair in pairs))


def _record(pair: Pair) -> dict[str, Any]:
    if pair.patch is None:
        record: dict[str, Any] = {
            "prompt": pair.clean,
            "true_answer": _answers_out(pair.clean_answers),
            "false_answer": _answers_out(pair.patch_answers),
        }
    else:
        record = {
            "clean_prefix": pair.clean,
            "patch_prefix": pair.patch,
            "clean_answer": _answers_out(pair.clean_answers),
            "patch_answer": _answers_out(pair.patch_answers),
        }
    record["case"] = pair.case
    optional = {"variant": pair.variant, "continuation": pair.continuation}
    return record | {key: value for key, value in optional.items() if value}


def _answers_out(answers: tuple[str, ...]) -> str | list[str]:
    return answers[0] if len(answers) == 1 else list(answers)


def _parse(line: str, place: str) -> Pair:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place} is not valid JSON ({error.msg} at column {error.colno}); mend or remove the line."
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{place} is JSON, but not an object with the keys {', '.join(PAIR_KEYS)}; mend or remove the line."
        )
    unpaired = "prompt" in record
    _check_keys(record, PROMPT_KEYS if unpaired else PAIR_KEYS, place)
    clean_key, right_key, wrong_key = (
        ("prompt", "true_answer", "false_answer")
        if unpaired
        else ("clean_prefix", "clean_answer", "patch_answer")
    )
    return Pair(
        case=_text(record, "case", place, default=DEFAULT_CASE),
        clean=_text(record, clean_key, place),
        patch=None if unpaired else _text(record, "patch_prefix", place),
        clean_answers=_answers(record, right_key, place),
        patch_answers=_answers(record, wrong_key, place),
        continuation=_text(record, "continuation", place, default=""),
        variant=_text(record, "variant", place, default=""),
    )


def _check_keys(record: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
    """Refuse a key that would be passed over: a misspelt "case" would silently change groups and lengths."""
    plural = [f"{key}s" for key in keys if key.endswith("answer")]
    for key in keys:
        if key not in record and f"{key}s" not in record and key != "case":
            raise _missing(record, key, place, [*keys, *plural])
    for key in record:
        if key not in (*keys, *plural, *OPTIONAL_KEYS):
            raise UserError(f"{place}: unknown key {key}; {nearest(key, (*keys, *OPTIONAL_KEYS))}.")


def _text(record: Mapping[str, Any], key: str, place: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if value is None:
        raise _missing(record, key, place, ())
    if not isinstance(value, str) or (not value and default is None):
        raise UserError(f"{place}: {key} is {value!r}, but a text is needed.")
    return value


def _answers(record: Mapping[str, Any], key: str, place: str) -> tuple[str, ...]:
    value = record.get(key, record.get(f"{key}s"))
    if value is None:
        raise _missing(record, key, place, ())
    answers = tuple(value) if isinstance(value, list) else (value,)
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise UserError(f"{place}: {key} is {value!r}, but a text or a list of texts is needed.")
    return answers


def _missing(record: Mapping[str, Any], key: str, place: str, known: Sequence[str]) -> UserError:
    """The sentence for a missing key; an unknown key that resembles it is taken for a slip of it."""
    slips = difflib.get_close_matches(key, [name for name in record if name not in known], n=1)
    hint = f" (did you mean '{slips[0]}'?)" if slips else ""
    return UserError(f"{place}: the key {key} is missing{hint}; add it or remove the line.")

"""The small grammar behind the agreement task: words with their two numbers, and templates with slots for them."""

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from circuitflow.errors import UserError, nearest
from circuitflow.store.files import read_json

Number = Literal["singular", "plural"]
NUMBERS: tuple[Number, ...] = get_args(Number)

RESOURCES = Path(__file__).parents[2] / "resources" / "agreement"
LEXICON = RESOURCES / "lexicon.json"
TEMPLATES = RESOURCES / "templates.json"


@dataclass(frozen=True)
class Word:
    """A word in both numbers (equal for a word that has none), and for verbs a phrase that may end the sentence."""

    singular: str
    plural: str
    ending: str = ""

    def form(self, number: Number) -> str:
        """The word in one number."""
        return self.singular if number == "singular" else self.plural


@dataclass(frozen=True)
class Slot:
    """A place in a template: the words that may stand there, and the slot whose number they follow, if any."""

    words: tuple[Word, ...]
    source: str
    """Name of the list of words in the lexicon."""
    agrees_with: str | None = None

    @property
    def is_noun(self) -> bool:
        """Whether the slot has a number of its own."""
        return self.agrees_with is None and any(word.singular != word.plural for word in self.words)


@dataclass(frozen=True)
class Template:
    """One structure: a prompt that stops right before the verb, the verb, and the rest of the sentence."""

    name: str
    prompt: str
    answer: str
    continuation: str
    slots: Mapping[str, Slot]

    @property
    def governor(self) -> str:
        """The slot whose number the answer follows."""
        governor = self.slots[self.answer].agrees_with
        assert governor is not None  # checked when the grammar is read
        return governor

    @property
    def prompt_slots(self) -> tuple[str, ...]:
        """Slots of the prompt, from left to right."""
        return tuple(_fields(self.prompt))

    @property
    def other_nouns(self) -> tuple[str, ...]:
        """Nouns of the prompt that do not govern the answer: the distractors."""
        return tuple(name for name in self.prompt_slots if self.slots[name].is_noun and name != self.governor)

    def render(self, words: Mapping[str, Word], numbers: Mapping[str, Number]) -> tuple[str, str, str]:
        """Prompt, answer and continuation with these words; ``numbers`` gives the number of each noun slot."""
        shown: dict[str, str] = {}
        for name, word in words.items():
            noun = self.slots[name].agrees_with or name
            shown[name] = word.form(numbers.get(noun, "singular"))
            shown[f"{name}_ending"] = word.ending
        return (
            self.prompt.format_map(shown),
            f" {shown[self.answer]}",
            self.continuation.format_map(shown),
        )

    def restricted(self, allowed: Mapping[str, frozenset[Word]]) -> "Template":
        """The same template with the words of its noun slots limited to ``allowed`` (by name of the word list)."""
        slots = {
            name: replace(slot, words=tuple(word for word in slot.words if word in allowed[slot.source]))
            if slot.is_noun
            else slot
            for name, slot in self.slots.items()
        }
        return replace(self, slots=slots)


Grammar = Mapping[str, Template]
"""Templates by name of the structure."""


def read_grammar(lexicon: Path = LEXICON, templates: Path = TEMPLATES) -> Grammar:
    """Read the word lists and the templates over them.

    :raises UserError: a file is missing or malformed, or a template names a list or a slot that does not exist.
    """
    lists = {
        name: _words(value, f"{lexicon}, {name}")
        for name, value in _object(read_json(lexicon), lexicon).items()
    }
    described = _object(read_json(templates), templates)
    return {name: _template(name, value, lists, f"{templates}, {name}") for name, value in described.items()}


def noun_lists(grammar: Grammar) -> dict[str, tuple[Word, ...]]:
    """The word lists that fill noun slots, by name."""
    slots = [slot for template in grammar.values() for slot in template.slots.values() if slot.is_noun]
    return {slot.source: slot.words for slot in slots}


def vocabulary(grammar: Grammar) -> list[str]:
    """Every word and sign that a sentence of the grammar can hold, sorted: enough for a word-level tokenizer."""
    found: set[str] = set()
    for template in grammar.values():
        for text in (template.prompt, template.continuation):
            for literal, *_ in string.Formatter().parse(text):
                found.update(_split(literal))
        for slot in template.slots.values():
            for word in slot.words:
                found.update(_split(f"{word.singular} {word.plural} {word.ending}"))
    return sorted(found)


def _split(text: str) -> list[str]:
    return text.replace(".", " . ").replace(",", " , ").split()


def _fields(text: str) -> Iterator[str]:
    for _, field, _, _ in string.Formatter().parse(text):
        if field is not None:
            yield field


def _object(value: Any, place: Path | str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{place} must be a JSON object with at least one entry.")
    return value


def _words(value: Any, place: str) -> tuple[Word, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: expected a list of words.")
    words = tuple(_word(entry, place) for entry in value)
    if len(set(words)) < len(words):
        repeated = next(word.singular for index, word in enumerate(words) if word in words[:index])
        raise UserError(f"{place}: the word '{repeated}' is listed twice; remove one.")
    return words


def _word(entry: Any, place: str) -> Word:
    if isinstance(entry, str) and entry.strip():
        return Word(entry, entry)
    if isinstance(entry, dict) and {"singular", "plural"} <= set(entry) <= {"singular", "plural", "ending"}:
        return Word(**entry)
    raise UserError(
        f'{place}: {entry!r} is neither a text nor {{"singular": …, "plural": …}} with an optional "ending".'
    )


def _template(name: str, value: Any, lists: Mapping[str, tuple[Word, ...]], place: str) -> Template:
    record = _object(value, place)
    if set(record) != {"prompt", "answer", "continuation", "slots"}:
        raise UserError(
            f"{place}: expected exactly the keys prompt, answer, continuation, slots; found {sorted(record)}."
        )
    slots = {slot: _slot(entry, lists, f"{place}, slot {slot}") for slot, entry in record["slots"].items()}
    template = Template(name, record["prompt"], record["answer"], record["continuation"], slots)
    _check_template(template, place)
    return template


def _slot(entry: Any, lists: Mapping[str, tuple[Word, ...]], place: str) -> Slot:
    record = _object(entry, place)
    source = str(record.get("words"))
    if source not in lists:
        raise UserError(f"{place}: no word list is called '{source}'; {nearest(source, lists)}.")
    return Slot(lists[source], source, record.get("agrees_with"))


def _check_template(template: Template, place: str) -> None:
    known = {name for slot in template.slots for name in (slot, f"{slot}_ending")}
    for field in (*_fields(template.prompt), *_fields(template.continuation), template.answer):
        if field not in known:
            raise UserError(f"{place}: no slot is called {field!r}; {nearest(field, known)}.")
    nouns = [name for name, slot in template.slots.items() if slot.is_noun]
    for name, slot in template.slots.items():
        if slot.agrees_with is not None and slot.agrees_with not in nouns:
            raise UserError(
                f"{place}, slot {name}: agrees_with must name a noun slot; {nearest(slot.agrees_with, nouns)}."
            )
    if template.slots[template.answer].agrees_with not in template.prompt_slots:
        raise UserError(
            f"{place}: the answer {template.answer!r} must agree with a noun of the prompt (agrees_with)."
        )
    followers = [
        name for name in template.prompt_slots if template.slots[name].agrees_with == template.governor
    ]
    if followers:
        raise UserError(
            f"{place}: {followers[0]!r} in the prompt follows the number of {template.governor!r}, so that clean and "
            "patched prompt would differ in more than one word; let it agree with another noun or give it one form."
        )

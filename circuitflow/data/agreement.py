"""Subject-verb agreement: minimal pairs and whole sentences from our own lexicon and templates.

Clean and patched prompt differ in one word: the noun that governs the verb stands in the other number. Distractor
nouns take both numbers. Train and test share no noun, hence no prompt and no combination of subject and verb.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from circuitflow.data.grammar import (
    LEXICON,
    NUMBERS,
    Grammar,
    Number,
    Template,
    Word,
    noun_lists,
    read_grammar,
)
from circuitflow.data.pairs import Pair, write_pairs
from circuitflow.data.seeds import generator
from circuitflow.errors import UserError, nearest
from circuitflow.jobs import Output
from circuitflow.store.files import write_json

TEST_SHARE = 1 / 3
"""Share of the nouns that only the test split uses."""


def generate_pairs(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """Stage: write ``train`` and ``test`` pairs as JSON lines, and ``provenance`` with the nouns of each split.

    Inputs: ``lexicon``, ``templates``. Params: ``structures`` (names of templates), ``train`` and ``test`` (pairs per
    structure), ``seed``.

    :raises UserError: unknown structure, or more pairs asked for than the lexicon makes (names the maximum).
    """
    grammar = read_grammar(inputs["lexicon"], inputs["templates"])
    words = split_nouns(grammar, params["seed"])
    for split in ("train", "test"):
        pairs: list[Pair] = []
        for structure in params["structures"]:
            template = structure_of(grammar, structure).restricted(words[split])
            _check_count(params[split], count_pairs(template), f"{split} pairs of '{structure}'")
            pairs.extend(draw_pairs(template, params[split], params["seed"]))
        write_pairs(out.files[split], pairs)
    nouns = {
        split: {name: sorted(word.singular for word in chosen) for name, chosen in lists.items()}
        for split, lists in words.items()
    }
    write_json(out.files["provenance"], {**out.provenance, "nouns": nouns})


def structure_of(grammar: Grammar, name: str) -> Template:
    """The template called ``name``.

    :raises UserError: there is none; names the nearest.
    """
    if name not in grammar:
        raise UserError(f"No agreement structure is called '{name}': {nearest(name, grammar)}.")
    return grammar[name]


def split_nouns(grammar: Grammar, seed: int) -> dict[str, dict[str, frozenset[Word]]]:
    """Nouns of each word list for ``train`` and for ``test``: disjoint, the same for every structure."""
    splits: dict[str, dict[str, frozenset[Word]]] = {"train": {}, "test": {}}
    for name, words in noun_lists(grammar).items():
        order = generator(seed, f"nouns {name}").permutation(len(words))
        n_test = round(TEST_SHARE * len(words))
        splits["test"][name] = frozenset(words[index] for index in order[:n_test])
        splits["train"][name] = frozenset(words[index] for index in order[n_test:])
    return splits


def count_pairs(template: Template) -> int:
    """How many distinct pairs a template makes: prompt pairs times verbs, whichever prompt is the clean one."""
    return len(_cells(template)) * len(_prompt_choices(template)) * len(template.slots[template.answer].words)


def draw_pairs(template: Template, count: int, seed: int) -> list[Pair]:
    """The first ``count`` pairs of a seeded order without repetition; a larger count only adds pairs at the end.

    Numbers are balanced: every combination of distractor number and direction (singular clean, plural clean) comes
    equally often. A prompt comes again, with another verb, only when all prompts have been used.
    """
    choices = _prompt_choices(template)
    cells = _cells(template)
    rng = generator(seed, template.name)
    orders = [rng.permutation(len(choices)) for _ in cells]
    verbs = template.slots[template.answer].words
    first_verbs = rng.integers(len(verbs), size=(len(cells), len(choices)))
    pairs = []
    for n in range(count):
        turn, cell = divmod(n, len(cells))
        again, place = divmod(turn, len(choices))
        chosen = choices[orders[cell][place]]
        words = {
            name: template.slots[name].words[i] for name, i in zip(template.prompt_slots, chosen, strict=True)
        }
        words[template.answer] = verbs[(first_verbs[cell, place] + again) % len(verbs)]
        words = _with_rest(template, words, rng)
        # Offsetting by `again` lets both directions of a prompt occur when it comes round again.
        pairs.append(_pair(template, words, cells[cell], NUMBERS[(turn + again) % 2]))
    return pairs


def sentences(seed: int, n: int, grammar: Grammar | None = None) -> list[str]:
    """Draw ``n`` grammatical sentences, the structures taking turns: text to train a toy model on."""
    grammar = read_grammar() if grammar is None else grammar
    rng = np.random.default_rng(seed)
    return [
        "".join(_sentence(template, rng)) for template, _ in zip(itertools.cycle(grammar.values()), range(n))
    ]


def _sentence(template: Template, rng: np.random.Generator) -> tuple[str, str, str]:
    words: dict[str, Word] = {}
    for name, slot in template.slots.items():
        free = [word for word in slot.words if not (slot.is_noun and word in words.values())]
        words[name] = free[rng.integers(len(free))]
    numbers = {name: NUMBERS[rng.integers(2)] for name, slot in template.slots.items() if slot.is_noun}
    return template.render(words, numbers)


def _pair(template: Template, words: Mapping[str, Word], cell: Sequence[Number], clean: Number) -> Pair:
    numbers = dict(zip(template.other_nouns, cell, strict=True))
    patch: Number = "plural" if clean == "singular" else "singular"
    clean_prompt, clean_answer, continuation = template.render(words, {**numbers, template.governor: clean})
    patch_prompt, patch_answer, _ = template.render(words, {**numbers, template.governor: patch})
    return Pair(
        case=template.name,
        clean=clean_prompt,
        patch=patch_prompt,
        clean_answers=(clean_answer,),
        patch_answers=(patch_answer,),
        continuation=continuation,
        variant="_".join((clean, *cell)),
    )


def _cells(template: Template) -> list[tuple[Number, ...]]:
    """Combinations of the distractors' numbers; one empty combination where there is no distractor."""
    return list(itertools.product(NUMBERS, repeat=len(template.other_nouns)))


def _prompt_choices(template: Template) -> np.ndarray:
    """Word indices (choices, prompt slots) of every prompt in which no noun comes twice."""
    slots = [template.slots[name] for name in template.prompt_slots]
    choices = np.indices([len(slot.words) for slot in slots]).reshape(len(slots), -1).T
    keep = np.ones(len(choices), bool)
    for (i, left), (j, right) in itertools.combinations(enumerate(slots), 2):
        if left.is_noun and right.is_noun and left.source == right.source:
            keep &= choices[:, i] != choices[:, j]
    return choices[keep]


def _with_rest(template: Template, words: dict[str, Word], rng: np.random.Generator) -> dict[str, Word]:
    """Add words for the slots that only the continuation uses."""
    rest = {
        name: slot.words[rng.integers(len(slot.words))]
        for name, slot in template.slots.items()
        if name not in words
    }
    return words | rest


def _check_count(wanted: int, maximum: int, what: str) -> None:
    if wanted > maximum:
        raise UserError(
            f"The task asks for {wanted} {what}, but the lexicon makes at most {maximum}; "
            f"lower the number to {maximum} or add words to {LEXICON.name}."
        )

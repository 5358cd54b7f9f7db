"""The agreement task: its grammar, its minimal pairs, its sentences."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from circuitflow.data.agreement import (
    count_pairs,
    draw_pairs,
    generate_pairs,
    sentences,
    split_nouns,
    structure_of,
)
from circuitflow.data.grammar import LEXICON, TEMPLATES, Template, read_grammar, vocabulary
from circuitflow.data.pairs import Pair, read_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.files import read_json

GRAMMAR = read_grammar()
STRUCTURES = list(GRAMMAR)
LISTS = json.loads(LEXICON.read_text())
NUMBER = {
    entry[number]: number
    for name in ("people", "things")
    for entry in LISTS[name]
    for number in ("singular", "plural")
}
VERB_NUMBER = {
    entry[number]: number
    for name in ("predicates", "transitives")
    for entry in LISTS[name]
    for number in ("singular", "plural")
}
GOVERNOR = {"simple": 1, "prepositional": 1, "across_relative": 1, "within_relative": 4}
"""Which word of the prompt governs the verb."""


def drawn(structure: str, count: int = 80, seed: int = 0) -> list[Pair]:
    return draw_pairs(GRAMMAR[structure], count, seed)


def test_the_lexicon_is_large_and_unambiguous() -> None:
    assert STRUCTURES == ["simple", "prepositional", "across_relative", "within_relative"]
    assert len(LISTS["people"]) >= 40
    assert len(LISTS["predicates"]) >= 25
    assert len(LISTS["prepositions"]) >= 8
    forms = [
        entry[n] for name in ("people", "things") for entry in LISTS[name] for n in ("singular", "plural")
    ]
    assert len(set(forms)) == len(forms)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_clean_and_patched_differ_in_the_number_of_the_governing_noun_alone(structure: str) -> None:
    for pair in drawn(structure):
        assert pair.patch is not None
        clean, patch = pair.clean.split(), pair.patch.split()
        differing = [place for place, (a, b) in enumerate(zip(clean, patch, strict=True)) if a != b]
        assert differing == [GOVERNOR[structure]]
        place = differing[0]
        assert {NUMBER[clean[place]], NUMBER[patch[place]]} == {"singular", "plural"}
        assert VERB_NUMBER[pair.clean_answers[0].strip()] == NUMBER[clean[place]]
        assert VERB_NUMBER[pair.patch_answers[0].strip()] == NUMBER[patch[place]]
        assert pair.variant.split("_")[0] == NUMBER[clean[place]]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_combination_of_numbers_comes_equally_often(structure: str) -> None:
    counts = Counter(pair.variant for pair in drawn(structure, 80))
    assert len(counts) == (2 if structure == "simple" else 4)
    assert len(set(counts.values())) == 1


def test_the_verb_inside_a_clause_agrees_with_the_distractor() -> None:
    for pair in drawn("across_relative"):
        _, _, who, the, other, verb = pair.clean.split()
        assert (who, the) == ("who", "the")
        assert VERB_NUMBER[verb] == NUMBER[other] == pair.variant.split("_")[1]


def test_the_verb_after_a_clause_agrees_with_the_outer_noun() -> None:
    for pair in drawn("within_relative"):
        assert VERB_NUMBER[pair.continuation.split()[0]] == NUMBER[pair.clean.split()[1]]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_pairs_are_distinct_and_a_larger_draw_only_adds(structure: str) -> None:
    pairs = drawn(structure, 400)
    assert (
        len(
            {
                frozenset((*pair.prompts, pair.clean_answers[0].strip(), pair.patch_answers[0]))
                for pair in pairs
            }
        )
        == 400
    )
    assert drawn(structure, 50) == pairs[:50]
    assert drawn(structure, 50, seed=1) != pairs[:50]


def test_structures_do_not_disturb_each_other() -> None:
    assert drawn("simple", 20) == drawn("simple", 20)
    renamed = replace(GRAMMAR["simple"], name="another")
    assert [pair.clean for pair in draw_pairs(renamed, 20, 0)] != [pair.clean for pair in drawn("simple", 20)]


def small(tmp_path: Path, templates: dict[str, Any] | None = None, **lists: Any) -> dict[str, Template]:
    """A grammar of three nouns and two verbs."""
    words = {
        "people": [{"singular": word, "plural": f"{word}s"} for word in ("boy", "girl", "king")],
        "verbs": [{"singular": "runs", "plural": "run"}, {"singular": "sits", "plural": "sit"}],
    }
    slots = {
        "subject": {"words": "people"},
        "other": {"words": "people"},
        "verb": {"words": "verbs", "agrees_with": "subject"},
    }
    template = {
        "prompt": "The {subject} by the {other}",
        "answer": "verb",
        "continuation": ".",
        "slots": slots,
    }
    (tmp_path / "lexicon.json").write_text(json.dumps(words | lists))
    (tmp_path / "templates.json").write_text(json.dumps(templates or {"by": template}))
    return dict(read_grammar(tmp_path / "lexicon.json", tmp_path / "templates.json"))


def test_all_pairs_that_exist_can_be_drawn(tmp_path: Path) -> None:
    template = small(tmp_path)["by"]
    # 3 subjects × 2 other nouns × 2 numbers of the other noun × 2 verbs
    assert count_pairs(template) == 24
    pairs = draw_pairs(template, 24, seed=3)
    assert (
        len({(frozenset(pair.prompts), frozenset(pair.clean_answers + pair.patch_answers)) for pair in pairs})
        == 24
    )
    assert (
        len({frozenset(pair.prompts) for pair in pairs[:12]}) == 12
    )  # no prompt again before all have been used


def stage(folder: Path, **changes: Any) -> Output:
    params = {"structures": STRUCTURES, "train": 60, "test": 30, "seed": 0} | changes
    files = {"train": "train.jsonl", "test": "test.jsonl", "provenance": "provenance.json"}
    out = Output(folder, {name: folder / file for name, file in files.items()}, {"stage": "generate_pairs"})
    generate_pairs({"lexicon": LEXICON, "templates": TEMPLATES}, params, out)
    return out


def test_train_and_test_share_no_prompt_and_no_noun(tmp_path: Path) -> None:
    out = stage(tmp_path)
    splits = {split: read_pairs(out.files[split]) for split in ("train", "test")}
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 240, "test": 120}
    prompts = {split: {p for pair in pairs for p in pair.prompts} for split, pairs in splits.items()}
    assert not prompts["train"] & prompts["test"]
    nouns = {split: {w for p in prompts[split] for w in p.split() if w in NUMBER} for split in splits}
    assert not nouns["train"] & nouns["test"]
    listed = read_json(out.files["provenance"])["nouns"]
    assert nouns["test"] & {word["singular"] for word in LISTS["people"]} <= set(listed["test"]["people"])
    assert not set(listed["train"]["people"]) & set(listed["test"]["people"])


def test_the_stage_is_deterministic_and_follows_its_seed(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        texts.append(stage(tmp_path / name, seed=seed).files["train"].read_bytes())
    assert texts[0] == texts[1] != texts[2]


def test_asking_for_too_many_names_the_maximum(tmp_path: Path) -> None:
    words = split_nouns(GRAMMAR, 0)
    maximum = count_pairs(GRAMMAR["simple"].restricted(words["test"]))
    assert maximum >= 1000
    with pytest.raises(UserError, match=f"{maximum + 1} test pairs of 'simple'.*at most {maximum}"):
        stage(tmp_path, structures=["simple"], test=maximum + 1)
    stage(tmp_path, structures=["simple"], test=maximum)


def test_several_hundred_pairs_of_every_structure_exist() -> None:
    words = split_nouns(GRAMMAR, 0)
    for template in GRAMMAR.values():
        for split in ("train", "test"):
            assert count_pairs(template.restricted(words[split])) > 500


def test_unknown_structure_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'prepositional'"):
        structure_of(GRAMMAR, "prepositionel")


def test_sentences_agree_and_stay_within_the_vocabulary() -> None:
    known = set(vocabulary(GRAMMAR))
    made = sentences(5, 200)
    assert made == sentences(5, 200)
    assert made != sentences(6, 200)
    assert len(set(made)) > 190
    for place, sentence in enumerate(made):
        assert sentence.endswith(".")
        words = sentence.removesuffix(".").split()
        assert {*words, "."} <= known
        structure = STRUCTURES[place % 4]
        verbs = [word for word in words if word in VERB_NUMBER]
        verb = verbs[1] if structure == "across_relative" else verbs[0]
        assert VERB_NUMBER[verb] == NUMBER[words[GOVERNOR[structure]]], sentence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "The {subjekt}"}, "no slot is called 'subjekt'; did you mean 'subject'"),
        ({"answer": "verbs"}, "no slot is called 'verbs'; did you mean 'verb'"),
        ({"slots": {"subject": {"words": "peple"}}}, "no word list is called 'peple'; did you mean 'people'"),
        ({"extra": 1}, "exactly the keys"),
        ({"prompt": "The king"}, "must agree with a noun of the prompt"),
        ({"prompt": "The {subject} who {verb}"}, "differ in more than one word"),
    ],
)
def test_a_broken_template_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    slots = {"subject": {"words": "people"}, "verb": {"words": "verbs", "agrees_with": "subject"}}
    template = {"prompt": "The {subject}", "answer": "verb", "continuation": ".", "slots": slots}
    with pytest.raises(UserError, match=message):
        small(tmp_path, {"mine": template | change})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a list of words"),
        ([{"singular": "boy"}], "neither a text nor"),
        ([{"singular": "boy", "plural": "boys"}] * 2, "'boy' is listed twice"),
    ],
)
def test_a_broken_word_list_is_named(tmp_path: Path, words: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(tmp_path, people=words)

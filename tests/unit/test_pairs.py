"""Pair files: reading, writing, importing, and mistakes in them."""

import json
from pathlib import Path

import pytest

from circuitflow.data.importing import import_pairs
from circuitflow.data.pairs import Pair, joined, read_pairs, write_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.files import read_json

LINE = {
    "clean_prefix": "The boys",
    "patch_prefix": "The boy",
    "clean_answer": "run",
    "patch_answer": "runs",
    "case": "simple",
}


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_feature_circuits_lines(tmp_path: Path) -> None:
    assert read_pairs(written(tmp_path / "p.jsonl", LINE)) == [
        Pair("simple", "The boys", "The boy", ("run",), ("runs",))
    ]


def test_unpaired_prompts_with_several_wrong_answers(tmp_path: Path) -> None:
    line = {"prompt": "Capital of France:", "true_answer": "Paris", "false_answers": ["Rome", "Bonn"]}
    assert read_pairs(written(tmp_path / "p.jsonl", line, "")) == [
        Pair("all", "Capital of France:", None, ("Paris",), ("Rome", "Bonn"))
    ]


def test_round_trip(tmp_path: Path) -> None:
    pairs = [
        Pair("a", "x", "y", (" p",), (" q", " r"), continuation=" and so on.", variant="singular"),
        Pair("b", "é “x”", None, ("1", "2"), ("3",)),
    ]
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"clean_prefix": "x",', "line 2 is not valid JSON"),
        ("[1]", "line 2 is JSON, but not an object"),
        ({**LINE, "clean_prefix": 3}, "line 2: clean_prefix is 3"),
        ({**LINE, "clean_answer": []}, r"line 2: clean_answer is \[\]"),
        ({**LINE, "clean_answer": ["a", " "]}, "line 2: clean_answer"),
        ({**LINE, "clean_prefix": ""}, "line 2: clean_prefix is ''"),
        (
            {"prompt": "x", "true_answer": "y", "false_answer": "z", "cas": "c"},
            "line 2: unknown key cas; did you mean 'case'?",
        ),
        ({"prompt": "x", "true_answer": "y"}, "line 2: the key false_answer is missing"),
        (
            {key.replace("patch_prefix", "patch_prefx"): value for key, value in LINE.items()},
            "line 2: the key patch_prefix is missing .did you mean 'patch_prefx'",
        ),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path: Path, line: object, message: str) -> None:
    path = written(tmp_path / "p.jsonl", LINE, line)
    with pytest.raises(UserError, match=message) as caught:
        read_pairs(path)
    assert str(path) in str(caught.value)


def test_missing_empty_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is empty"):
        read_pairs(written(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_pairs(tmp_path / "binary.jsonl")


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("The boys", "run", "The boys run"),
        ("The boys", " run", "The boys run"),
        ("The boys ", "run", "The boys run"),
        ("Answer:\n", "Yes", "Answer:\nYes"),
        ("Answer: (", "A", "Answer: (A"),
        ('He said "', "Yes", 'He said "Yes'),
        ("", "Yes", "Yes"),
    ],
)
def test_a_space_is_put_between_words(prompt: str, answer: str, text: str) -> None:
    assert joined(prompt, answer) == text


def test_sentences_carry_answer_and_continuation() -> None:
    pair = Pair("a", "The boys", "The boy", (" run",), (" runs",), continuation=" home.")
    assert pair.sentences() == ("The boys run home.", "The boy runs home.")
    assert Pair("a", "2 + 2 =", None, ("4",), ("5",)).sentences() == ("2 + 2 = 4",)


def imported(tmp_path: Path, train: list[Pair], test: list[Pair]) -> Output:
    for name, pairs in (("train", train), ("test", test)):
        write_pairs(tmp_path / f"{name}.in.jsonl", pairs)
    files = {"train": "train.jsonl", "test": "test.jsonl", "provenance": "provenance.json"}
    out = Output(tmp_path, {name: tmp_path / file for name, file in files.items()}, {"stage": "import_pairs"})
    import_pairs({name: tmp_path / f"{name}.in.jsonl" for name in ("train", "test")}, {}, out)
    return out


def test_import_leaves_out_test_pairs_that_share_a_prompt_with_train(tmp_path: Path) -> None:
    train = [Pair("a", "The boys", "The boy", ("run",), ("runs",))]
    shared = Pair("a", "The cats", "The boy", ("sit",), ("sits",))
    fresh = Pair("a", "The cats", "The cat", ("sit",), ("sits",))
    out = imported(tmp_path, train, [shared, fresh])
    assert read_pairs(out.files["train"]) == train
    assert read_pairs(out.files["test"]) == [fresh]
    assert read_json(out.files["provenance"]) == {"stage": "import_pairs", "shared_prompts_left_out": 1}


def test_import_refuses_a_test_file_without_new_prompts(tmp_path: Path) -> None:
    pairs = [Pair("a", "The boys", "The boy", ("run",), ("runs",))]
    with pytest.raises(UserError, match="All 1 pairs"):
        imported(tmp_path, pairs, pairs)

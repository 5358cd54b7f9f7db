"""Pairs in tokens: alignment, answers as single tokens, what is dropped and why."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from circuitflow.data import tokenization
from circuitflow.data.pairs import Pair, write_pairs
from circuitflow.data.prompts import Dropped, PromptReader, start_token
from circuitflow.data.token_pairs import TokenPairs, load_token_pairs
from circuitflow.data.tokenization import tokenize_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.tables import read_provenance, read_table

WORDS = [
    "The",
    "boy",
    "boys",
    "girl",
    "girls",
    "by",
    "near",
    "the",
    "car",
    "cars",
    "run",
    "runs",
    "sit",
    "sits",
    "Yes",
    "No",
]
PARAMS = {
    "chat_template": False,
    "generation_prefix": "",
    "prepend_bos": False,
    "position": "last",
    "length": {"mode": "modal", "percentile": 95.0},
}
CHAT = (
    "{% for m in messages %}<|endoftext|>user: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


def word_level(spaced: bool = True, **special: str) -> PreTrainedTokenizerFast:
    """One token a word; ``spaced`` ones carry their leading space, as those of real models do."""
    entries = ["<|pad|>", "<|unknown|>", "<|end|>", *WORDS, *(f" {word}" for word in WORDS if spaced)]
    core = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="<|unknown|>"))
    split = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\w\s]|\s"), "isolated")
    core.pre_tokenizer = split if spaced else pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse() if spaced else None
    special = {"pad_token": "<|pad|>", "unk_token": "<|unknown|>", "eos_token": "<|end|>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, in which the words above are single tokens and few others are."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([f"{word} {word}" for word in WORDS] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|start|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


TOKENIZERS = {"words": word_level, "bare words": lambda: word_level(spaced=False), "bytes": byte_level}


def reader(tokenizer: Any, **changes: Any) -> PromptReader:
    return PromptReader(tokenizer, PARAMS | changes)


def pair(
    clean: str = "The boys", patch: str | None = "The boy", right: Any = "run", wrong: Any = "runs"
) -> Pair:
    answers = [(answer,) if isinstance(answer, str) else tuple(answer) for answer in (right, wrong)]
    return Pair("case", clean, patch, *answers)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("answers", [("run", "runs"), (" run", " runs")])
def test_the_answer_is_the_token_that_follows_the_prompt(name: str, answers: tuple[str, str]) -> None:
    tokenizer = TOKENIZERS[name]()
    found = reader(tokenizer).read(7, pair(right=answers[0], wrong=answers[1]))
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert (found.pair, found.position, found.first_change) == (7, 1, 1)
    assert [*found.clean, *found.right] == encode("The boys run")
    assert [*found.patch, *found.wrong] == encode("The boy runs")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (pair(clean="The boys by the car"), "lengths differ"),
        (pair(wrong="run"), "answers overlap"),
        (pair(wrong="runs sits"), "answer is more than one token"),
        (pair(patch="The boys"), "clean and patched prompt are the same"),
    ],
)
def test_what_cannot_be_used_is_dropped(name: str, changed: Pair, reason: str) -> None:
    with pytest.raises(Dropped) as caught:
        reader(TOKENIZERS[name]()).read(0, changed)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (pair(right="swim"), "answer is outside the vocabulary"),
        (pair(clean="The kings"), "prompt has words outside the vocabulary"),
    ],
)
def test_unknown_words_of_a_word_level_tokenizer(changed: Pair, reason: str) -> None:
    with pytest.raises(Dropped) as caught:
        reader(word_level()).read(0, changed)
    assert caught.value.reason == reason


def test_a_trailing_space_belongs_to_the_answer_of_a_bpe() -> None:
    with pytest.raises(Dropped) as caught:
        reader(byte_level()).read(0, pair(clean="The boys ", patch="The boy "))
    assert caught.value.reason == "answer merges with the end of the prompt"


def test_unpaired_prompts_with_several_answers() -> None:
    tokenizer = word_level()
    found = reader(tokenizer).read(0, pair(patch=None, right=["run", " run"], wrong=["runs", "sits"]))
    assert found.patch == []
    assert tokenizer.convert_ids_to_tokens(found.right) == [" run"]  # two spellings, one token
    assert tokenizer.convert_ids_to_tokens(found.wrong) == [" runs", " sits"]


@pytest.mark.parametrize(("position", "with_start"), [(1, 2), (-4, -4)])
def test_an_answer_at_a_position_that_is_not_the_last(position: int, with_start: int) -> None:
    tokenizer = byte_level()
    changed = pair(clean="The boys near the car", patch="The boy near the car")
    found = reader(tokenizer, position=position).read(0, changed)
    assert found.position == 1
    assert tokenizer.decode(found.right) == " run"
    started = reader(tokenizer, position=with_start, prepend_bos=True).read(0, changed)
    assert started.position == 2  # the start token counts
    assert started.right == found.right


def test_the_text_before_the_position_decides_the_spelling_of_the_answer() -> None:
    tokenizer = byte_level()
    found = reader(tokenizer, position=0).prompt("(The boys")
    assert (found.start, found.start_tokens) == ("(", [tokenizer.convert_tokens_to_ids("(")])
    answer = reader(tokenizer, position=0).read(0, pair("(The boys", None, "Yes", "No"))
    assert tokenizer.decode(answer.right) == "Yes"


def test_positions_outside_the_prompt_and_changes_after_the_position() -> None:
    changed = pair(clean="The car by the boys", patch="The car by the boy")
    for position, reason in (
        (9, "prompt ends before"),
        (-9, "prompt ends before"),
        (1, "prompts differ only after"),
    ):
        with pytest.raises(Dropped, match=reason):
            reader(byte_level(), position=position).read(0, changed)


def test_the_start_token_is_the_separator_of_pretraining() -> None:
    tokenizer = byte_level()
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert start_token(tokenizer) == separator != tokenizer.bos_token_id
    assert reader(tokenizer, prepend_bos=True).prompt("The boys").tokens[0] == separator
    assert start_token(word_level()) == 2
    assert start_token(word_level(bos_token="<|pad|>")) == 0
    bare = word_level()
    bare.eos_token = None
    with pytest.raises(UserError, match="prepend_bos"):
        reader(bare, prepend_bos=True)


def test_chat_template_and_generation_prefix() -> None:
    tokenizer = byte_level()
    with pytest.raises(UserError, match="no chat template"):
        reader(tokenizer, chat_template=True)
    tokenizer.chat_template = CHAT
    chat = reader(tokenizer, chat_template=True, generation_prefix=" The", prepend_bos=True)
    found = chat.prompt("No boys")
    assert tokenizer.decode(found.tokens) == "<|endoftext|>user: No boys\nbot: The"
    assert found.tokens.count(start_token(tokenizer)) == 1  # the template wrote it, so it is not put again
    assert tokenizer.decode(chat.read(0, pair("No boys", "No boy", "car", "cars")).right) == " car"


def made(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pairs: Mapping[str, list[Pair]],
    tokenizer: Any = None,
    longest: int | None = None,
    **changes: Any,
) -> Output:
    """Run the stage on pairs."""
    monkeypatch.setattr(tokenization, "load_tokenizer", lambda path: tokenizer or word_level())
    monkeypatch.setattr(
        tokenization, "load_config", lambda path: PretrainedConfig(max_position_embeddings=longest)
    )
    for split, members in pairs.items():
        write_pairs(folder / f"{split}.jsonl", members)
    out = Output(
        folder, {name: folder / f"{name}.parquet" for name in ("train", "test", "dropped")}, {"stage": "t"}
    )
    inputs = {"model": folder / "model.json"} | {split: folder / f"{split}.jsonl" for split in pairs}
    tokenize_pairs(inputs, PARAMS | changes, out)
    return out


LONG = Pair("case", "The boys by the car", "The boy by the car", ("run",), ("runs",))
OTHER = Pair("other", "The girls by the car", "The girl by the car", ("sit",), ("sits",))
SHORT = pair("The girls", "The girl", "sit", "sits")


def test_the_stage_pads_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpaired = Pair("questions", "The car", None, ("Yes",), ("No", "sit"))
    out = made(tmp_path, monkeypatch, {"train": [pair(), OTHER, unpaired], "test": [SHORT]})
    found = load_token_pairs(out.files["train"])
    assert len(found) == 3
    assert found.clean.shape == found.patch.shape == found.mask.shape == (3, 5)
    assert found.mask.sum(1).tolist() == [2, 5, 2]
    assert found.mask[0].tolist() == [True, True, False, False, False]
    assert (found.clean[~found.mask] == 0).all()
    assert found.has_patch.tolist() == [True, True, False]
    assert (found.patch[2] == 0).all()
    assert found.position.tolist() == [1, 4, 1]
    assert found.first_change.tolist() == [1, 1, 0]
    assert found.right.shape == (3, 1)
    assert (found.wrong[:, 1] == -1).tolist() == [True, True, False]
    assert found.pair.tolist() == [0, 1, 2]
    assert found.case == ["case", "other", "questions"]
    assert {found.clean.dtype, found.position.dtype, found.wrong.dtype} == {torch.int64}
    assert read_provenance(out.files["train"]) == {"stage": "t"}
    table = read_table(out.files["train"])
    assert list(table["clean_tokens"][1]) == ["The", " girls", " by", " the", " car"]
    assert table["patch_text"][2] == ""


def test_rows_of_pairs_can_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made(tmp_path, monkeypatch, {"train": [pair(), OTHER], "test": [SHORT]})
    pairs = load_token_pairs(out.files["train"])
    for rows in ([1, 0], slice(None, None, 1), torch.tensor([False, True])):
        some = pairs[rows]
        expected = torch.arange(2)[rows]
        assert isinstance(some, TokenPairs)
        assert some.clean.equal(pairs.clean[expected])
        assert some.case == [pairs.case[row] for row in expected]
        assert len(some) == len(expected)
    assert pairs.to("cpu").wrong.equal(pairs.wrong)


def drops(out: Output) -> list[tuple[str, int, str]]:
    table = read_table(out.files["dropped"])
    return list(zip(table["split"], table["pair"], table["reason"], strict=True))


def test_every_dropped_pair_is_in_the_table_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [
        pair(right="swim"),
        pair(wrong="run"),
        pair(clean="The boys by"),
        pair(),
        SHORT,
        pair(right=" run"),
    ]
    out = made(tmp_path, monkeypatch, {"train": [*bad, LONG], "test": [LONG, SHORT]})
    assert drops(out) == [
        ("train", 0, "answer is outside the vocabulary"),
        ("train", 1, "answers overlap"),
        ("train", 2, "lengths differ"),
        ("train", 5, "duplicate"),
        ("train", 6, "length filter"),
        ("test", 0, "length filter"),  # by the lengths of train
    ]
    assert load_token_pairs(out.files["train"]).pair.tolist() == [3, 4]
    table = read_table(out.files["dropped"])
    assert table["detail"][0] == "'swim'"
    assert (table["clean"][2], table["case"][2]) == ("The boys by", "case")


def test_prompts_longer_than_the_model_takes_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = {"train": [pair(), LONG], "test": [SHORT]}
    out = made(tmp_path, monkeypatch, pairs, longest=4, length={"mode": "all", "percentile": 95.0})
    assert drops(out) == [("train", 1, "prompt is longer than the model takes")]
    assert read_table(out.files["dropped"])["detail"][0] == "5 of at most 4 tokens"


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        ({"mode": "modal", "percentile": 95.0}, [0, 1]),
        ({"mode": "percentile", "percentile": 95.0}, [0, 1, 2]),
        ({"mode": "percentile", "percentile": 60.0}, [0, 1]),
        ({"mode": "all", "percentile": 1.0}, [0, 1, 2]),
    ],
)
def test_length_filters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: dict[str, Any], kept: list[int]
) -> None:
    out = made(tmp_path, monkeypatch, {"train": [pair(), SHORT, LONG], "test": [SHORT]}, length=length)
    assert load_token_pairs(out.files["train"]).pair.tolist() == kept


def test_each_case_has_its_own_modal_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = made(tmp_path, monkeypatch, {"train": [pair(), SHORT, OTHER], "test": [OTHER]})
    assert load_token_pairs(out.files["train"]).mask.sum(1).tolist() == [2, 2, 5]
    assert drops(out) == []


def test_of_two_equally_frequent_lengths_the_shorter_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made(tmp_path, monkeypatch, {"train": [LONG, pair()], "test": [SHORT]})
    assert load_token_pairs(out.files["train"]).pair.tolist() == [1]


def test_a_vocabulary_without_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strangers = [pair(right="swim", wrong="swims"), pair("The girls", "The girl", "hop", "hops")]
    with pytest.raises(
        UserError, match=r"No test pair .*2 × answer is outside the vocabulary.*'swim' in pair 0"
    ):
        made(tmp_path, monkeypatch, {"train": [pair()], "test": strangers})


def test_equal_work_gives_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        out = made(tmp_path / name, monkeypatch, {"train": [pair(), OTHER], "test": [SHORT]})
        contents.append([file.read_bytes() for file in out.files.values()])
    assert contents[0] == contents[1]

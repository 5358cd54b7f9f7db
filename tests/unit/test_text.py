"""Contexts of the corpus's text: what follows them there, what splits share, and what is dropped."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PretrainedConfig

from circuitflow.data import text
from circuitflow.data.text import sample_contexts, window_starts
from circuitflow.data.token_pairs import load_token_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.toy import word_tokenizer
from circuitflow.store.arrays import ArraySpec, StoreWriter, open_store
from circuitflow.store.objects import Manifest, ObjectFolder, Recipe
from circuitflow.store.tables import read_table

WORDS = [f"w{i}" for i in range(60)]
TOKENIZER = word_tokenizer(WORDS)
START = TOKENIZER.bos_token_id
BLOCK = 16
PARAMS = {"train": 30, "test": 8, "length": 5, "seed": 0, "prepend_bos": True}


def documents(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    first = len(TOKENIZER) - len(WORDS)
    return [[START, *rng.integers(first, len(TOKENIZER), n).tolist()] for n in lengths]


def corpus(root: Path, training: list[list[int]], held_out: list[list[int]]) -> Path:
    """A store as tokenize_corpus writes it; the rest of a part that fills no block is left out."""
    rows = {"tokens": [], "documents": []}
    held = []
    for part, first in ((training, 0), (held_out, len(training))):
        tokens = np.concatenate([np.array(document, np.int32) for document in part])
        numbers = np.repeat(np.arange(first, first + len(part), dtype=np.int32), list(map(len, part)))
        used = len(tokens) // BLOCK * BLOCK
        before = sum(map(len, rows["tokens"]))
        rows["tokens"].append(tokens[:used].reshape(-1, BLOCK))
        rows["documents"].append(numbers[:used].reshape(-1, BLOCK))
        held = list(range(before, before + used // BLOCK))
    arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
    recipe = Recipe("tokenize_corpus", {}, {}, code="test")
    with ObjectFolder(root, recipe) as kept:
        spec = ArraySpec(arrays["tokens"].shape, "int32")
        writer = StoreWriter(kept.path, dict.fromkeys(arrays, spec), 1000, {"held_out_blocks": held})
        for index in writer.missing():
            writer.write_shard(index, arrays)
        content, details = writer.finish()
        kept.finish(content, details)
    path = root / "corpus/manifest.json"
    Manifest("store", recipe.fingerprint, content, recipe.as_dict(), details).write(path)
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return corpus(tmp_path, documents(0, [40, 25, 3, 90, 60]), documents(1, [30, 50]))


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "load_tokenizer", lambda path: TOKENIZER)
    monkeypatch.setattr(text, "load_config", lambda path: PretrainedConfig(max_position_embeddings=8))

    def sampled(manifest: Path, name: str = "out", **params) -> dict[str, Path]:
        folder = tmp_path / name
        folder.mkdir()
        files = {kind: folder / f"{kind}.parquet" for kind in ("train", "test", "dropped")}
        sample_contexts(
            {"model": tmp_path, "corpus": manifest}, {**PARAMS, **params}, Output(folder, files, {})
        )
        return files

    return sampled


def flat(manifest: Path, split: str) -> list[int]:
    store = open_store(manifest)
    held = np.isin(np.arange(store.rows), store.attrs["held_out_blocks"])
    return store.read("tokens")[held if split == "test" else ~held].ravel().tolist()


def places(haystack: list[int], needle: list[int]) -> list[int]:
    return [i for i in range(len(haystack) - len(needle) + 1) if haystack[i : i + len(needle)] == needle]


def test_each_answer_follows_its_context_in_a_document_of_its_split(manifest: Path, sample) -> None:
    files = sample(manifest)
    for split, other in (("train", "test"), ("test", "train")):
        table = read_table(files[split])
        assert len(table["clean"]) == PARAMS[split]
        for clean, right in zip(table["clean"], table["right"], strict=True):
            assert clean[0] == START
            window = [*clean[1:].tolist(), *right.tolist()]
            assert START not in window, "a context lies within one document"
            assert len(window) == PARAMS["length"] + 1
            assert places(flat(manifest, split), window)
            assert not places(flat(manifest, other), window)


def test_contexts_are_unpaired_prompts_that_the_stages_after_can_read(manifest: Path, sample) -> None:
    pairs = load_token_pairs(sample(manifest)["test"])
    assert not pairs.has_patch.any()
    assert pairs.wrong.shape == (8, 0)
    assert pairs.position.tolist() == [5] * 8
    assert pairs.mask.all()
    assert set(pairs.case) == {"text"}


def test_without_a_start_token_a_context_has_its_length(manifest: Path, sample) -> None:
    table = read_table(sample(manifest, prepend_bos=False)["train"])
    assert {len(clean) for clean in table["clean"]} == {5}
    assert set(table["position"].tolist()) == {4}
    assert table["clean_text"][0] == TOKENIZER.decode(table["clean"][0].tolist())


def test_equal_seeds_give_equal_bytes_and_others_other_contexts(manifest: Path, sample) -> None:
    first, again, other = (sample(manifest, name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for kind in ("train", "test", "dropped"):
        assert first[kind].read_bytes() == again[kind].read_bytes()
    assert first["train"].read_bytes() != other["train"].read_bytes()


def test_windows_do_not_overlap_and_as_many_are_found_as_fit() -> None:
    tokens = np.array([9, 1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 9, 1, 2, 3], np.int32)
    numbers = np.repeat([4, 5, 6], [8, 3, 4])
    starts = [window_starts(tokens, numbers, 3, 9, np.random.default_rng(seed)) for seed in range(20)]
    for found in starts:
        assert len(found) == 3, "two of the first document, none of the second, one of the third"
        assert found[1] - found[0] == 3
        assert found[2] == 12
    assert {int(found[0]) for found in starts} == {1, 2}, "what is left over before the first window is drawn"
    assert len(window_starts(tokens, numbers, 3, None, np.random.default_rng(0))) == 4


def test_a_text_that_came_before_is_dropped_within_and_across_splits(tmp_path: Path, sample) -> None:
    same = documents(0, [5])[0] + [len(TOKENIZER) - 1]
    manifest = corpus(tmp_path, [same, same, *documents(2, [60])], [same, *documents(3, [60])])
    files = sample(manifest, train=8, test=5)
    dropped = read_table(files["dropped"])
    assert set(dropped["reason"].tolist()) <= {"duplicate"}
    windows = {
        split: {
            (*clean.tolist(), *right.tolist())
            for clean, right in zip(
                read_table(files[split])["clean"], read_table(files[split])["right"], strict=True
            )
        }
        for split in ("train", "test")
    }
    assert len(windows["train"]) == 8
    assert len(windows["test"]) == 5
    assert not windows["train"] & windows["test"]


def test_unknown_words_are_dropped(tmp_path: Path, sample) -> None:
    training = documents(0, [80])
    training[0][3] = TOKENIZER.unk_token_id
    manifest = corpus(tmp_path, training, documents(1, [40]))
    files = sample(manifest, train=9, test=3)
    for clean in read_table(files["train"])["clean"]:
        assert TOKENIZER.unk_token_id not in clean


def test_contexts_longer_than_the_model_takes_are_told(manifest: Path, sample) -> None:
    with pytest.raises(
        UserError, match=r"A context \(task.pairs.length\) has 9 tokens, .* at most 8 at once"
    ):
        sample(manifest, length=8)  # and the start token


@pytest.mark.parametrize(("split", "more"), [("train", "corpus.sources"), ("test", "corpus.held_out")])
def test_too_few_contexts_tell_how_many_there_are(manifest: Path, sample, split: str, more: str) -> None:
    message = rf"Key task.pairs.{split} is 500, but .* only \d+ different contexts of 5 tokens; .*{more}"
    with pytest.raises(UserError, match=message):
        sample(manifest, **{split: 500})

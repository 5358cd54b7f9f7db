"""Corpora: whole documents, start tokens, packing, the held-out split, resuming."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from circuitflow.data import corpus
from circuitflow.data.corpus import tokenize_corpus
from circuitflow.data.pairs import Pair, write_pairs
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.store.arrays import Store, StoreWriter

START = 0


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    """One token a byte, so that texts can be read back exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = {entry: index for index, entry in enumerate(["<|endoftext|>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=entries, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>", model_max_length=50)
    monkeypatch.setattr(corpus, "load_tokenizer", lambda path: made)
    monkeypatch.setattr(corpus, "load_config", lambda path: PretrainedConfig(max_position_embeddings=LONGEST))
    return made


LONGEST = 256
"""Tokens that the model takes at once."""


def texts(n: int, name: str = "text") -> list[str]:
    return [f"{name} {index}. " + "ab cd " * (index % 7) for index in range(n)]


def jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def store(folder: Path, sources: list[dict[str, Any]], inputs: Any = None, **changes: Any) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    params = {"sources": sources, "block": 32, "held_out": 0.1, "seed": 0} | changes
    out = Output(folder, {}, {})
    tokenize_corpus({"model": folder / "model.json", **(inputs or {})}, params, out)
    assert out.content
    return Store(folder, folder / "manifest.json")


def documents_in(found: Store, tokenizer: PreTrainedTokenizerFast, blocks: slice) -> dict[int, str]:
    """Text of every document, or of as much of it as those blocks hold, by its number."""
    tokens, numbers = found.read("tokens")[blocks].ravel(), found.read("documents")[blocks].ravel()
    return {int(number): tokenizer.decode(tokens[numbers == number]) for number in np.unique(numbers)}


def test_documents_are_whole_start_with_the_start_token_and_never_cross_the_split(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    written = texts(120)
    file = jsonl(tmp_path / "texts.jsonl", written)
    found = store(tmp_path / "o", [{"kind": "files", "glob": "*", "tokens": 10_000}], {"files": [file]})
    n_held_out = len(found.attrs["held_out_blocks"])
    assert found.shape("tokens") == found.shape("documents")
    assert found.shape("tokens")[1] == 32
    assert 0 < n_held_out < found.shape("tokens")[0] // 5
    training = documents_in(found, tokenizer, slice(None, -n_held_out))
    held_out = documents_in(found, tokenizer, slice(-n_held_out, None))
    assert not set(training) & set(held_out)
    for part in (training, held_out):
        whole, last = list(part.values())[:-1], list(part.values())[-1]
        assert all(text.removeprefix("<|endoftext|>") in written for text in whole)
        assert all(text.startswith("<|endoftext|>") for text in (*whole, last))
        assert any(text.startswith(last.removeprefix("<|endoftext|>")) for text in written)
    every = [*training.values(), *held_out.values()]
    assert len(set(every)) == len(every)
    tokens, numbers = found.read("tokens"), found.read("documents")
    for part in (slice(None, -n_held_out), slice(-n_held_out, None)):
        changes = np.flatnonzero(np.diff(numbers[part].ravel(), prepend=-1))
        assert changes.tolist() == np.flatnonzero(tokens[part].ravel() == START).tolist()
        assert (np.diff(numbers[part].ravel()) >= 0).all()
    assert found.attrs["left_out_tokens"] == sum(map(len, written)) + len(written) - tokens.size


def test_a_budget_and_the_held_out_share_are_kept(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", texts(200))
    found = store(tmp_path / "o", files_source(4000), {"files": [file]})
    (source,) = found.attrs["sources"]
    assert source["documents"] < 200
    assert 0.98 * 4000 < source["tokens"] <= 4000
    assert 0.09 < source["held_out_tokens"] / source["tokens"] <= 0.1


def test_several_sources_of_files_take_the_files_of_their_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, n in (("a", 30), ("b", 60)):
        jsonl(tmp_path / f"{name}.jsonl", texts(n, name))
    sources = [{"kind": "files", "glob": f"{name}*", "tokens": 5000} for name in ("a", "b")]
    found = store(tmp_path / "o", sources, {"files": [Path("a.jsonl"), Path("b.jsonl")]})
    assert [source["documents"] for source in found.attrs["sources"]] == [30, 60]
    assert all(0 < source["held_out_documents"] < 8 for source in found.attrs["sources"])


def test_the_bundled_text_and_a_budget(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    found = store(tmp_path, [{"kind": "bundled", "tokens": 60_000}], block=128)
    (source,) = found.attrs["sources"]
    assert 0.97 * 60_000 < source["tokens"] <= 60_000
    assert " the " in tokenizer.decode(found.read("tokens").ravel())


def test_task_sentences(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [
        Pair("s", f"The boys {n}", f"The boy {n}", (" run",), (" runs",), continuation=" home.")
        for n in range(20)
    ]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    found = store(tmp_path / "o", [{"kind": "task", "tokens": 9000}], {"pairs": tmp_path / "pairs.jsonl"})
    assert found.attrs["sources"][0]["documents"] == 40
    sentences = {sentence for pair in pairs for sentence in pair.sentences()}
    cut = 2  # the last document of either part may be
    texts_found = {
        text.removeprefix("<|endoftext|>") for text in documents_in(found, tokenizer, slice(None)).values()
    }
    assert len(texts_found & sentences) >= 40 - cut - found.attrs["left_out_tokens"] // 15
    with pytest.raises(UserError, match="no pairs are given"):
        store(tmp_path / "p", [{"kind": "task", "tokens": 9000}])


def test_text_that_spells_a_special_token_stays_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = jsonl(tmp_path / "t.jsonl", ["a <|endoftext|> b"] * 20)
    found = store(tmp_path / "o", [{"kind": "files", "glob": "*", "tokens": 5000}], {"files": [file]})
    documents = documents_in(found, tokenizer, slice(None))
    tokens, numbers = found.read("tokens"), found.read("documents")
    assert (tokens == START).sum() == len(documents) == len(np.unique(numbers))
    assert documents[0] == "<|endoftext|>a <|endoftext|> b"


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.txt" for index in range(3)]
    for file in files:
        file.write_text("x" * 50)
    found = store(
        tmp_path / "o", [{"kind": "files", "glob": "*", "tokens": 5000}], {"files": files}, held_out=0.3
    )
    assert found.attrs["sources"] == [
        {"kind": "files", "documents": 3, "tokens": 153, "held_out_documents": 1, "held_out_tokens": 51}
    ]


def test_the_split_follows_the_seed(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", texts(100))
    tokens = [
        store(tmp_path / name, [{"kind": "files", "glob": "*", "tokens": 9000}], {"files": [file]}, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, second, other = (found.read("tokens") for found in tokens)
    assert (first == second).all()
    assert first.shape != other.shape or (first != other).any()


def test_an_interrupted_run_goes_on_at_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHARD_TOKENS", 10 * 32)
    file = jsonl(tmp_path / "t.jsonl", texts(100))
    arguments = ([{"kind": "files", "glob": "*", "tokens": 9000}], {"files": [file]})
    whole = store(tmp_path / "whole", *arguments)
    write = StoreWriter.write_shard
    done: list[int] = []

    def killed(self: StoreWriter, index: int, values: Any) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(index)
        write(self, index, values)

    monkeypatch.setattr(StoreWriter, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "cut", *arguments)
    assert done == [0, 1, 2]
    done.clear()
    monkeypatch.setattr(StoreWriter, "write_shard", lambda *args: (done.append(args[1]), write(*args)))
    resumed = store(tmp_path / "cut", *arguments)
    assert done == list(range(3, whole.layout.n_shards))
    for file in sorted((tmp_path / "whole").rglob("*")):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "cut" / file.relative_to(tmp_path / "whole")).read_bytes()
    assert (resumed.read("documents") == whole.read("documents")).all()


def files_source(tokens: int = 5000) -> list[dict[str, Any]]:
    return [{"kind": "files", "glob": "*", "tokens": tokens}]


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        (["only one document " * 5], {}, "single document"),
        (
            ["x" * 90, "y" * 80],
            {"tokens": 40},
            r"sources\[0\].tokens is 40, but the shortest document has 81",
        ),
        (["x" * 90, "y" * 10], {}, "held-out part of the corpus has 11 tokens, less than one block of 32"),
        (["x" * 10, "y" * 40], {}, "held-out part of the corpus has 11"),
        ([" ", ""], {}, "gives no text but white space"),
    ],
)
def test_too_little_text(tmp_path: Path, documents: list[str], changes: dict[str, Any], message: str) -> None:
    file = jsonl(tmp_path / "t.jsonl", documents)
    with pytest.raises(UserError, match=message):
        store(tmp_path / "o", files_source(**changes), {"files": [file]})


def test_blocks_longer_than_the_model_takes_are_told(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "t.jsonl", texts(200))
    store(tmp_path / "a", files_source(), {"files": [file]}, block=LONGEST)
    with pytest.raises(UserError, match=r"A block \(corpus.block\) has 257 tokens, .* at most 256 at once"):
        store(tmp_path / "b", files_source(), {"files": [file]}, block=LONGEST + 1)


def test_broken_files_are_named(tmp_path: Path) -> None:
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"text": "x"}\n{"txt": "y"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl, line 2 is not a JSON object with the key"):
        store(tmp_path / "o", files_source(), {"files": [lines]})
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8"):
        store(tmp_path / "o", files_source(), {"files": [binary]})
    with pytest.raises(UserError, match=r"none\.txt does not exist"):
        store(tmp_path / "o", files_source(), {"files": [tmp_path / "none.txt"]})


HUB = {
    "kind": "hub",
    "id": "some/texts",
    "revision": "abc",
    "split": "train",
    "column": "text",
    "tokens": 2000,
}


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_hub_data_set_is_streamed_up_to_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    read: list[int] = []

    def load(name: str, **settings: Any) -> Any:
        asked.update(settings, name=name)
        for index in range(10_000):
            read.append(index)
            yield {"text": f"row {index} " * 5}

    fake_datasets(monkeypatch, load)
    found = store(tmp_path, [HUB])
    assert asked == {"name": "some/texts", "revision": "abc", "split": "train", "streaming": True}
    assert len(read) < 200
    assert 0.9 * 2000 < found.attrs["sources"][0]["tokens"] <= 2000


def test_a_hub_data_set_needs_the_extra_a_network_and_its_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"circuitflow\[hub\]"):
        store(tmp_path, [HUB])

    def unreachable(name: str, **settings: Any) -> Any:
        raise ConnectionError("no route to host")

    fake_datasets(monkeypatch, unreachable)
    with pytest.raises(UserError, match=r"some/texts .*cannot be read from the hub: no route to host"):
        store(tmp_path, [HUB])
    fake_datasets(monkeypatch, lambda name, **settings: iter([{"content": "x"}]))
    with pytest.raises(UserError, match="no column text; did you mean 'content'"):
        store(tmp_path, [HUB])

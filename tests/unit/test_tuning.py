"""Fine-tuning: what changes, what stays, and that a killed run ends with the bytes of one never killed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from circuitflow.data.pairs import Pair, write_pairs
from circuitflow.dictionaries.state import STATE_FILE, Interval
from circuitflow.diffing import tuning
from circuitflow.diffing.text import swapped, tuning_blocks
from circuitflow.diffing.tuning import Rate, batch_of, fine_tune_model
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.prepared import load_tokenizer
from circuitflow.store.objects import read_manifest

SETTINGS: dict[str, Any] = {
    "text": {"kind": "task", "answers": "swapped"},
    "tokens": 2000,
    "steps": 6,
    "batch": 4,
    "block": 16,
    "learning_rate": 3e-3,
    "layers": None,
    "held_out": 0.1,
    "seed": 0,
    "compute": {"threads": 1, "device": "cpu", "deterministic": True},
}
NOUNS = ("boy", "girl", "dog", "cat", "farmer", "teacher")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    write_pairs(
        path, [Pair("simple", f"The {noun}", f"The {noun}s", (" is",), (" are",), " .") for noun in NOUNS]
    )
    return path


def tuned(manifest: Path, pairs: Path, folder: Path, **changes: Any) -> Output:
    """One run of the stage."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {**SETTINGS, **changes}
    out = Output(folder, {}, {"params": json.loads(json.dumps(params))})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fine_tune_model({"model": manifest, "pairs": pairs, "files": []}, params, out)
    finally:
        torch.set_num_threads(before)
    return out


def weights(folder: Path) -> Mapping[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_loss_on_held_out_text_falls_and_the_model_can_be_loaded(
    tmp_path: Path, toy_manifest: Callable[..., Path], pairs: Path
) -> None:
    out = tuned(toy_manifest(), pairs, tmp_path / "a", steps=20)
    facts = out.details["tuning"]
    assert facts["held_out_loss_after"] < 0.6 * facts["held_out_loss_before"]
    assert facts["tokens"] == 20 * 4 * 16
    assert out.details["layers"] == 4
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    base = read_manifest(toy_manifest()).folder(toy_manifest())
    assert weights(tmp_path / "a").keys() == weights(base).keys()


def test_only_the_chosen_layers_change(
    tmp_path: Path, toy_manifest: Callable[..., Path], pairs: Path
) -> None:
    tuned(toy_manifest(), pairs, tmp_path / "a", layers=[1, 3])
    before = weights(read_manifest(toy_manifest()).folder(toy_manifest()))
    after = weights(tmp_path / "a")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1." in name or ".layers.3." in name}


def test_a_killed_run_ends_with_the_bytes_of_one_never_killed(
    tmp_path: Path, toy_manifest: Callable[..., Path], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned(toy_manifest(), pairs, tmp_path / "whole")
    monkeypatch.setattr(Interval, "due", lambda self: True)  # a state after every step
    step = tuning._Tuning._step
    taken: list[int] = []

    def killed(self: Any) -> dict[str, Any]:
        if self._done == 4:
            raise KeyboardInterrupt
        taken.append(self._done)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(tuning._Tuning, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            tuned(toy_manifest(), pairs, tmp_path / "killed")
    assert (tmp_path / "killed" / STATE_FILE).is_file()
    monkeypatch.setattr(tuning._Tuning, "_step", lambda self: taken.append(self._done) or step(self))
    resumed = tuned(toy_manifest(), pairs, tmp_path / "killed")
    assert taken == [0, 1, 2, 3, 4, 5]  # nothing was done twice
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert (resumed.content, resumed.details) == (whole.content, whole.details)


def test_the_state_of_other_settings_is_not_picked_up(
    tmp_path: Path, toy_manifest: Callable[..., Path], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interval, "due", lambda self: True)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tuned(toy_manifest(), pairs, tmp_path / "a", steps=3)
    assert (tmp_path / "a" / STATE_FILE).is_file()
    again = tuned(toy_manifest(), pairs, tmp_path / "a", steps=3, learning_rate=1e-3)
    fresh = tuned(toy_manifest(), pairs, tmp_path / "b", steps=3, learning_rate=1e-3)
    assert again.content == fresh.content


def test_every_block_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    blocks = np.arange(10)[:, None]
    drawn = np.concatenate([batch_of(blocks, number, 4, seed=1)[:, 0] for number in range(5)])
    first, second = drawn[:10], drawn[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert np.array_equal(batch_of(blocks, 3, 4, seed=1)[:, 0], drawn[12:16])  # by number alone


def test_the_rate_rises_over_a_tenth_and_falls_to_zero() -> None:
    rate = Rate(peak=1.0, steps=20)
    assert [rate.at(0), rate.at(1), rate.at(2)] == [0.5, 1.0, 1.0]
    assert rate.at(11) == 0.5
    assert rate.at(19) == pytest.approx(1 / 18)


def test_swapped_sentences_end_with_the_other_answer(pairs: Path) -> None:
    assert swapped(pairs)[:2] == ["The boy are .", "The boys is ."]


def test_unpaired_prompts_end_with_their_false_answer(tmp_path: Path) -> None:
    line = {"prompt": "The boy", "true_answer": " is", "false_answer": " are"}
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    assert swapped(tmp_path / "p.jsonl") == ["The boy are"]


def test_blocks_are_cut_from_documents_in_a_seeded_order(
    toy_manifest: Callable[..., Path], pairs: Path
) -> None:
    tokenizer = load_tokenizer(toy_manifest())
    settings = {**SETTINGS, "block": 5, "tokens": 40, "held_out": 0.25}
    text = {"kind": "task", "answers": "right"}
    training, held_out = tuning_blocks(text, [], pairs, tokenizer, settings)
    assert (training.shape, held_out.shape) == ((6, 5), (2, 5))
    words = tokenizer.convert_ids_to_tokens(training[0].tolist())
    assert words[0] == tokenizer.eos_token  # each document starts with it
    assert words[1] == "The"
    other, _ = tuning_blocks(text, [], pairs, tokenizer, {**settings, "seed": 1})
    assert not np.array_equal(training, other)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": [0, 4]}, "layers names layer 4, but the model has layers 0 to 3"),
        ({"block": 5000}, r"A block \(diffing.tuning.block\) has 5000 tokens, but the model takes at most"),
        ({"tokens": 20}, "has 20 tokens, but at least two blocks of 16"),
        ({"learning_rate": 1e30}, "stopped being finite at step"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    tmp_path: Path,
    toy_manifest: Callable[..., Path],
    pairs: Path,
    changes: dict[str, Any],
    sentence: str,
) -> None:
    with pytest.raises(UserError, match=sentence):
        tuned(toy_manifest(), pairs, tmp_path / "a", **changes)

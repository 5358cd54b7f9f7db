"""Small models trained on the spot: they learn the task, come out the same each time, and refuse what cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitflow.data.agreement import draw_pairs, sentences
from circuitflow.data.grammar import LEXICON, TEMPLATES, read_grammar
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.prepared import load_tokenizer
from circuitflow.models.running import run
from circuitflow.models.toy import prepare_toy


def made(folder: Path, source: dict[str, Any], sites: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Run the stage; gives the bytes of the files it wrote."""
    folder.mkdir(exist_ok=True)
    params = {"source": source, "architecture": "auto", "required_sites": list(sites)}
    prepare_toy({"lexicon": LEXICON, "templates": TEMPLATES}, params, Output(folder, {}, {}))
    return {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}


def test_a_toy_agrees_verb_with_subject(toy_lm: Callable[..., Any]) -> None:
    lm = toy_lm()
    for name, template in read_grammar().items():
        pairs = draw_pairs(template, 200, seed=11)
        tokens = torch.tensor(lm.tokenizer([pair.clean for pair in pairs])["input_ids"])
        last = run(lm, tokens, torch.ones_like(tokens, dtype=torch.bool)).last
        assert last is not None
        logits = lm.unembed(last[:, -1])
        right, wrong = (
            torch.tensor(lm.tokenizer([getattr(pair, side)[0] for pair in pairs])["input_ids"])
            for side in ("clean_answers", "patch_answers")
        )
        assert right.shape == wrong.shape == (200, 1)  # answers are single tokens
        accuracy = (logits.gather(1, right) > logits.gather(1, wrong)).float().mean().item()
        assert accuracy > 0.9, name


def test_a_toy_is_the_same_each_time_whatever_the_threads(tmp_path: Path) -> None:
    source = {"kind": "toy", "architecture": "gpt_neox", "layers": 2, "d_model": 16, "heads": 2, "seed": 3}
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    first = made(tmp_path / "a", {**source, "train_steps": 4})
    torch.set_num_threads(2)
    try:
        second = made(tmp_path / "b", {**source, "train_steps": 4})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    other = made(tmp_path / "c", {**source, "train_steps": 4, "seed": 4})
    assert other != first


def test_a_toy_checks_its_sites_first(tmp_path: Path) -> None:
    source = {"kind": "toy", "architecture": "llama", "layers": 2, "d_model": 16, "heads": 2, "seed": 0}
    with pytest.raises(UserError, match=r"'resid\.5' is beyond"):
        made(tmp_path, {**source, "train_steps": 10**9}, sites=("resid.5",))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"architecture": "lama"}, "did you mean 'llama'"), ({"d_model": 30}, "multiple of 8, for example 24")],
)
def test_a_toy_that_cannot_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = {"kind": "toy", "architecture": "llama", "layers": 2, "d_model": 32, "heads": 4, "seed": 0}
    with pytest.raises(UserError, match=message):
        made(tmp_path, {**source, "train_steps": 1, **change})


def test_word_tokenizer_keeps_the_text(toy_manifest: Callable[..., Path]) -> None:
    """Tokens carry their leading space, as those of larger models do."""
    tokenizer = load_tokenizer(toy_manifest())
    text = " ".join(sentences(seed=5, n=50))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == text
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]

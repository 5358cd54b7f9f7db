"""A second model is checked against the run's own before its weights are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from circuitflow.diffing.second import prepare_second_model
from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.saving import save_model
from circuitflow.models.toy import word_tokenizer
from circuitflow.store.objects import Manifest, read_manifest


@pytest.fixture
def first(tmp_path: Path, random_lm: Callable[..., Any]) -> Path:
    """Manifest of the run's own model."""
    folder = tmp_path / "objects" / "first"
    folder.mkdir(parents=True)
    out = Output(folder, {}, {})
    lm = random_lm("llama", "float32")
    save_model(lm.hf, lm.tokenizer, lm.arch, out)
    assert out.content is not None
    manifest = tmp_path / "model" / "manifest.json"
    Manifest("model", "first", out.content, {}, out.details).write(manifest)
    return manifest


@pytest.fixture
def folder(tmp_path: Path, random_lm: Callable[..., Any]) -> Path:
    """The same model again, as another's files."""
    lm = random_lm("llama", "float32")
    lm.hf.save_pretrained(tmp_path / "second")
    lm.tokenizer.save_pretrained(tmp_path / "second")
    return tmp_path / "second"


def prepared(first: Path, folder: Path, site: str = "resid.1", architecture: str = "auto") -> Output:
    """Run the stage."""
    out = Output(first.parent / "out", {}, {})
    source = {"kind": "path", "path": str(folder)}
    params = {"source": source, "architecture": architecture, "required_sites": [site]}
    prepare_second_model({"model": first, "files": []}, params, out)
    return out


def refused(first: Path, folder: Path, sentence: str, **choices: str) -> None:
    """The stage ends with this sentence, and needs no weights to say so."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(UserError, match=sentence):
        prepared(first, folder, **choices)


def changed(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_same_model_fits(first: Path, folder: Path) -> None:
    assert prepared(first, folder).content == read_manifest(first).content


def test_further_tokens_are_no_hindrance(
    first: Path, folder: Path, random_lm: Callable[..., Any], tmp_path: Path
) -> None:
    words = random_lm("llama", "float32").tokenizer
    words.save_pretrained(tmp_path / "words")
    tokens = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["<chat>"] = len(words)
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    assert prepared(first, folder).details["layers"] == 2


def test_a_tokenizer_that_lacks_tokens_is_refused(first: Path, folder: Path) -> None:
    """The corpus has numbers that this model has no embedding for."""
    word_tokenizer(["The", "is"]).save_pretrained(folder)
    refused(first, folder, r"diffing\.model\) has another tokenizer: \d+ of \d+ tokens differ")


def test_another_width_is_refused(first: Path, folder: Path) -> None:
    changed(folder, head_dim=8)
    refused(first, folder, r"is 32 wide at z\.1, but the run's is 24", site="z.1")
    changed(folder, hidden_size=20)
    refused(first, folder, r"is 20 wide at resid\.1, but the run's is 16")


def test_a_site_that_it_lacks_is_refused(first: Path, folder: Path) -> None:
    refused(first, folder, r"'resid\.2' is beyond the model's depth", site="resid.2")


def test_its_architecture_can_be_named(first: Path, folder: Path) -> None:
    changed(folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    refused(first, folder, "'mistral' is not supported")
    refused(
        first, folder, "cannot be read by AutoModelForCausalLM", architecture="llama"
    )  # further than before


def test_messages_name_its_key(first: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(first, folder, r"\(diffing\.model\) cannot be read by AutoModelForCausalLM")
    with pytest.raises(UserError, match=r"^diffing\.model\.path '.*nowhere' does not exist"):
        prepared(first, folder.parent / "nowhere")

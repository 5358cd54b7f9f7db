"""Language models to test on: random ones of every architecture, and small ones that have learned agreement."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where files run side by side, those that take minutes begin."""
    items.sort(key=lambda item: item.path.parent.name not in ("workflow", "cluster"))


@pytest.fixture(scope="session")
def random_lm() -> Callable[..., Any]:
    """``random_lm(architecture, dtype="float64", **settings)``: two layers, width 16, every weight random.

    Heads are wider than d_model / n_heads where the architecture allows it. The vocabulary is that of the agreement
    task. ``settings`` go into the transformers configuration (a tuple becomes a list). Models are shared by the tests
    of a session: change nothing in them.
    """
    made = cache(_random_lm)
    return lambda architecture="llama", dtype="float64", **settings: made(architecture, dtype, **settings)


@pytest.fixture(scope="session")
def toy_manifest(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``toy_manifest(architecture="llama")``: manifest of a prepared toy (4 layers, width 32) that agrees verbs.

    It lies at ``results/toy/model/manifest.json`` of a folder of its own, as in a workflow.
    """

    @cache
    def made(architecture: str) -> Path:
        return _prepare_toy(tmp_path_factory.mktemp(f"toy_{architecture}") / "results" / "toy", architecture)

    return lambda architecture="llama": made(architecture)


@pytest.fixture(scope="session")
def toy_lm(toy_manifest: Callable[..., Path]) -> Callable[..., Any]:
    """``toy_lm(architecture="llama", dtype="float32")``: the toy of ``toy_manifest``, loaded."""

    @cache
    def loaded(architecture: str, dtype: str) -> Any:
        from circuitflow.models.loading import load_model

        return load_model(toy_manifest(architecture), dtype)

    return lambda architecture="llama", dtype="float32": loaded(architecture, dtype)


def _random_lm(architecture: str, dtype: str, **settings: Any) -> Any:
    import torch

    from circuitflow.data.grammar import read_grammar, vocabulary
    from circuitflow.models.running import LanguageModel
    from circuitflow.models.toy import random_model, toy_config, word_tokenizer

    torch.set_num_threads(1)
    tokenizer = word_tokenizer(vocabulary(read_grammar()))
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    if architecture not in ("gpt2", "gpt_neox"):
        settings = {"head_dim": 6, **settings}
    config = toy_config(architecture, layers=2, d_model=16, heads=4, vocab=len(tokenizer), **settings)
    model = random_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # initial weights are too small, and norms and biases are trivial
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return LanguageModel(model.to(getattr(torch, dtype)), tokenizer)


def _prepare_toy(root: Path, architecture: str) -> Path:
    from circuitflow.data.grammar import LEXICON, TEMPLATES
    from circuitflow.jobs import Output
    from circuitflow.models.toy import prepare_toy
    from circuitflow.store.objects import Manifest, ObjectFolder, Recipe

    source = {"kind": "toy", "architecture": architecture, "layers": 4, "d_model": 32, "heads": 4, "seed": 0}
    params = {"source": {**source, "train_steps": 150}, "architecture": "auto", "required_sites": []}
    recipe = Recipe("prepare_model", params, {}, code="test")
    with ObjectFolder(root, recipe) as kept:
        out = Output(kept.path, {}, {})
        prepare_toy({"lexicon": LEXICON, "templates": TEMPLATES}, params, out)
        assert out.content is not None
        kept.finish(out.content, out.details)
    path = root / "model" / "manifest.json"
    Manifest("model", recipe.fingerprint, out.content, recipe.as_dict(), out.details).write(path)
    return path

"""Attribution graphs equal to circuit-tracer's own, node for node, on the same weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.family import Family
from circuitflow.graphs.building import Settings, build_graph
from tests.fixtures.graph_examples import random_family
from tests.fixtures.peers import run_peer

pytestmark = [pytest.mark.peers, pytest.mark.slow]
SIDE = Path(__file__).with_name("circuit_tracer_attribution_side.py")
KINDS = ("single", "skip", "cross_layer", "capped")
TOKENS = [3, 17, 9, 40, 11, 25, 8]


def relu(family: Family) -> Family:
    """The same with every positive pre-activation, as cross-layer transcoders have it there."""
    members = (
        Dictionary(
            "relu", one.reads, one.writes, "threshold", one.W_enc, one.b_enc, one.W_dec, one.b_dec,
            extra={"threshold": torch.zeros_like(one.b_enc)},
        )
        for one in family.members
    )  # fmt: skip
    return Family(tuple(members))


def write(folder: Path, lm: Any, family: Family, max_nodes: int | None) -> None:
    lm.hf.save_pretrained(folder / "model")
    for number, member in enumerate(family.members):
        tensors = {name: getattr(member, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")}
        kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / f"member_{number}.safetensors")
    asked = {
        "tokens": TOKENS, "max_nodes": max_nodes, "max_logits": 5, "probability": 0.95, "batch": 8,
        "rope_theta": 10000, "k": family.members[0].settings.get("k"),
        "cross_layer": len(family.members[0].writes) > 1,
    }  # fmt: skip
    (folder / "family.json").write_text(json.dumps(asked))


def given(random_lm: Callable[..., Any], kind: str) -> tuple[Any, Family, int | None]:
    """Model, transcoders and cap. With a cap the order of influence counts."""
    lm = random_lm("llama", dtype="float32")
    family = random_family(lm, cross=kind == "cross_layer", skip=kind == "skip")
    return lm, relu(family) if kind == "cross_layer" else family, 20 if kind == "capped" else None


@pytest.fixture(scope="module")
def folder(random_lm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind, with the library's graph in it."""
    root = tmp_path_factory.mktemp("graphs")
    for kind in KINDS:
        (root / kind).mkdir()
        write(root / kind, *given(random_lm, kind))
    run_peer("circuit-tracer", SIDE, "attribute", *(root / kind for kind in KINDS))
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_graph_is_the_librarys(random_lm: Callable[..., Any], folder: Path, kind: str) -> None:
    """Adjacency to 1e-4 of its largest entry, activations, logits and probabilities."""
    lm, family, max_nodes = given(random_lm, kind)
    theirs = load_file(folder / kind / "theirs.safetensors")
    # The library renews the order of influence every 4 batches, of 8 here.
    ours = build_graph(
        lm, family, TOKENS, settings=Settings(max_logits=5, max_nodes=max_nodes, reorder_every=32)
    )
    assert np.array_equal(ours.features, theirs["features"].numpy())
    assert np.array_equal(ours.logits, theirs["logits"].numpy())
    np.testing.assert_allclose(ours.activations, theirs["activations"].numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.probabilities, theirs["probabilities"].numpy(), rtol=1e-4, atol=1e-7)
    expected = theirs["adjacency"].numpy()
    assert ours.dense().shape == expected.shape
    assert np.abs(ours.dense() - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.count_nonzero(expected) > 300

"""Descriptions of features: hand-counted firing, contexts that respect documents and blocks, logit weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.dictionary import NO_SKIP, Dictionary, Skip, save_dictionary
from circuitflow.features import contexts
from circuitflow.features.contexts import describe_features
from circuitflow.features.firing import BestPlaces, Firing, Strengths, TokenTally
from circuitflow.features.logit_weights import extremes, in_stream, listed_logits, logit_weights
from circuitflow.features.tokens import distinct, token_text, visible
from circuitflow.jobs import Output
from circuitflow.models.running import run
from circuitflow.store.tables import write_table
from tests.fixtures.activation_store import write_store

SITE, WIDTH, BLOCK = "resid.1", 32, 8
COMPUTE = {"threads": 1, "device": "cpu", "deterministic": True}
PARAMS = {"site": SITE, "top": 3, "contexts": 2, "window": 3, "logits": 4, "compute": COMPUTE}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def coordinates(skip: Skip = NO_SKIP, encoder: bool = True) -> Dictionary:
    """Feature i is coordinate i."""
    rows, zeros, at = torch.eye(WIDTH), torch.zeros(WIDTH), (SITE,)
    return Dictionary("identity", at, at, "nonzero", rows if encoder else None, zeros, rows, zeros, skip)


def world(folder: Path, toy_manifest: Callable[..., Path], dictionary: Dictionary) -> dict[str, Path]:
    """Three blocks of text in four documents, and three pairs, with activations planted by hand."""
    tokens = np.arange(3 * BLOCK, dtype=np.int32).reshape(3, BLOCK) % 20 + 3
    documents = np.repeat([0, 0, 1, 2, 2, 3], 4).astype(np.int32).reshape(3, BLOCK)
    x = np.zeros((3 * BLOCK, WIDTH), np.float32)
    x[[2, 3, 9, 13, 20], 5] = [1, 4, 8, 2, 3]  # feature 5: all documents
    x[[8, 10], 7] = [0.5, 6]  # feature 7: document 1 only
    x[0, 5] = 100  # position 0
    save_dictionary(folder / "weights.safetensors", dictionary)
    nodes = {
        "site": [SITE, SITE, "resid.0", SITE, SITE],
        "kind": ["error", "feature", "feature", "feature", "feature"],
        "feature": [-1, 7, 1, 5, 9],
        "rank": [1, 3, 1, 2, 4],
    }
    write_table(folder / "nodes.parquet", nodes)
    pairs = {
        "pair": [0, 1, 2],
        "case": ["simple", "simple", "long"],
        "clean": [[3, 4, 5], [3, 6, 5], [3, 4, 7, 5]],
        "patch": [[3, 8, 5], [3, 9, 5], []],
        "position": [2, 2, 3],
        "first_change": [1, 1, 0],
        "right": [[10]] * 3,
        "wrong": [[11]] * 3,
    }
    write_table(folder / "tokens.parquet", pairs)
    clean, patched = np.zeros((2, 3, 4, WIDTH), np.float32)
    clean[0, 1, 5], clean[1, 1, 5], clean[2, 2, 5] = 2, 3, 7
    clean[0, 3, 5] = 50  # padding: must not count
    patched[0, 1, 5] = 5
    patched[2, 1, 5] = 60  # an unpaired prompt has no patched side
    arrays = {f"{SITE}/clean": clean, f"{SITE}/patched": patched}
    return {
        "model": toy_manifest(),
        "dictionary": folder / "weights.safetensors",
        "nodes": folder / "nodes.parquet",
        "tokens": folder / "tokens.parquet",
        "corpus": write_store(folder, "corpus", {"tokens": tokens, "documents": documents}, [], 2),
        "activations": write_store(folder, "activations", {SITE: x}, [], 16, BLOCK),
        "gradients": write_store(folder, "gradients", arrays, [], 2),
    }


def described(folder: Path, inputs: dict[str, Path], **params: Any) -> SimpleNamespace:
    file = folder / "features.json"
    describe_features(inputs, {**PARAMS, **params}, Output(folder, {"features": file}, {"stage": "test"}))
    value = json.loads(file.read_text())
    return SimpleNamespace(**value, by_number={entry["feature"]: entry for entry in value["features"]})


def test_features_of_the_site_come_by_rank_and_errors_do_not(tmp_path, toy_manifest):
    found = described(tmp_path, world(tmp_path, toy_manifest, coordinates()), top=2)
    assert [entry["feature"] for entry in found.features] == [5, 7]
    assert found.site == SITE
    assert found.tokens == 24
    assert found.provenance == {"stage": "test"}


def test_strengths_are_hand_counted_and_skipped_tokens_do_not_count(tmp_path, toy_manifest):
    found = described(tmp_path, world(tmp_path, toy_manifest, coordinates(Skip((0,)))))
    feature = found.by_number[5]
    assert feature["density"] == round(5 / 24, 5)
    assert feature["max"] == 8
    assert feature["mean_active"] == 3.6
    assert feature["histogram"]["edges"][0] == 1
    assert feature["histogram"]["counts"] == [1, 0, 1, 1, 1, 0, 1]  # 1 | 2 | 3 | 4 | 8 in half octaves
    silent = found.by_number[9]
    assert (silent["density"], silent["contexts"], silent["histogram"]["counts"]) == (0, [], [])


def test_contexts_stay_in_their_document_and_block(tmp_path, toy_manifest):
    inputs = world(tmp_path, toy_manifest, coordinates(Skip((0,))))
    feature = described(tmp_path, inputs).by_number[5]
    first, second = feature["contexts"]
    # Row 9 is position 1 of block 1, whose first four tokens are document 1: the window (3 to each side) stops there.
    assert (first["block"], first["start"], first["peak"]) == (1, 0, 1)
    assert first["activations"] == [0, 8, 0, 0]
    # Document 0 has two active tokens; only its strongest makes a context.
    assert (second["block"], second["start"], second["activations"]) == (0, 0, [0, 0, 1, 4, 0, 0, 0])
    wide = described(tmp_path, inputs, contexts=9).by_number[5]
    assert [max(item["activations"]) for item in wide["contexts"]] == [8, 4, 3, 2]


def test_contexts_that_say_the_same_are_shown_once(tmp_path, toy_manifest):
    inputs = world(tmp_path, toy_manifest, coordinates())
    same = np.tile(np.arange(BLOCK, dtype=np.int32) + 3, (3, 1))
    documents = np.repeat(np.arange(3, dtype=np.int32), BLOCK).reshape(3, BLOCK)
    x = np.zeros((3 * BLOCK, WIDTH), np.float32)
    x[[5, 13, 22], 5] = [1, 2, 3]  # position 5 twice, position 6 once
    inputs["corpus"] = write_store(tmp_path, "same", {"tokens": same, "documents": documents}, [], 2)
    inputs["activations"] = write_store(tmp_path, "again", {SITE: x}, [], 16, BLOCK)
    feature = described(tmp_path, inputs).by_number[5]
    assert [max(item["activations"]) for item in feature["contexts"]] == [3, 2]


def test_the_task_tells_of_real_tokens_of_both_sides(tmp_path, toy_manifest, toy_lm):
    task = described(tmp_path, world(tmp_path, toy_manifest, coordinates())).by_number[5]["task"]
    # Token 4 occurs in the clean prompts 0 and 2, and fires in the first of them only.
    assert [(entry["id"], entry["mean"], entry["share"], entry["n"]) for entry in task["tokens"]] == [
        (7, 7, 1, 1),
        (8, 5, 1, 1),
        (6, 3, 1, 1),
        (4, 2, 0.5, 1),
    ]
    long, simple = task["prompts"]
    assert (long["case"], long["side"], long["activations"], long["peak"]) == (
        "long",
        "clean",
        [0, 0, 7, 0],
        2,
    )
    assert (simple["case"], simple["side"], simple["activations"]) == ("simple", "patched", [0, 5, 0])
    assert simple["tokens"][1] == token_text(toy_lm().tokenizer, 8)


def test_nothing_depends_on_the_size_of_batches(tmp_path, toy_manifest, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(48, WIDTH, generator=generator)
    dictionary = Dictionary(
        "topk", (SITE,), (SITE,), "topk", rows, torch.zeros(48), rows, torch.zeros(WIDTH), NO_SKIP, {"k": 6}
    )
    inputs = world(tmp_path, toy_manifest, dictionary)
    values = np.random.default_rng(0).standard_normal((3 * BLOCK, WIDTH)).astype(np.float32)
    inputs["activations"] = write_store(tmp_path, "random", {SITE: values}, [], 16, BLOCK)
    found = []
    for rows_at_once, pairs_at_once in ((8192, 64), (BLOCK, 1), (2 * BLOCK, 2)):
        monkeypatch.setattr(contexts, "ROWS_AT_ONCE", rows_at_once)
        monkeypatch.setattr(contexts, "PAIRS_AT_ONCE", pairs_at_once)
        described(tmp_path, inputs)
        found.append((tmp_path / "features.json").read_bytes())
    assert found[0] == found[1] == found[2]
    assert b'"contexts": [\n' in found[0]


def test_a_bare_decoder_has_logit_weights_only(tmp_path, toy_manifest):
    found = described(tmp_path, world(tmp_path, toy_manifest, coordinates(encoder=False)))
    assert found.tokens == 0
    assert all(set(entry) == {"feature", "logits"} for entry in found.features)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma", "qwen3"])
def test_logit_weights_are_the_derivative_of_the_logits(random_lm, architecture):
    """Along a direction that leaves the norm's scale as it is, up to that scale and the same shift of all logits."""
    lm = random_lm(architecture)
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, lm.d_model, generator=generator, dtype=torch.float64)
    layer_norm = architecture in ("gpt2", "gpt_neox")
    if layer_norm:
        x, direction = x - x.mean(), direction - direction.mean() + 0.7  # the shift must not matter
    flat = direction - direction.mean() if layer_norm else direction
    x = x - flat * (x @ flat) / (flat @ flat)
    scale = x.square().mean().sqrt()
    step = 1e-5 * direction
    derivative = (lm.unembed(x + step) - lm.unembed(x - step)) / 2e-5 * scale
    found = logit_weights(lm, direction[None])[0]
    assert torch.allclose(found.double(), derivative - derivative.mean(), atol=1e-4)
    assert not torch.allclose(found.double(), torch.zeros_like(derivative), atol=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_directions_at_z_go_through_the_output_projection(random_lm, architecture):
    lm = random_lm(architecture)
    direction = torch.randn(lm.width("z.1"), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([[1, 2, 3]])

    def added(z):
        replace = {"z.1": lambda value: z.expand_as(value)}
        return run(lm, tokens, torch.ones_like(tokens, dtype=torch.bool), replace=replace, capture=["attn.1"])

    found = in_stream(lm, "z.1", direction[None])[0].double()
    moved = (added(direction).sites["attn.1"] - added(0 * direction).sites["attn.1"])[0, 0]
    if architecture == "gemma2":  # a norm follows: up to its scale
        moved = moved * (found.norm() / moved.norm())
    torch.testing.assert_close(found, moved, rtol=1e-4, atol=1e-5)
    listed = listed_logits(lm, "z.1", direction[None], 3)
    assert listed[0]["logits"] == extremes(logit_weights(lm, found[None])[0], 3)


def test_directions_that_add_nothing_to_the_stream_have_no_logits(random_lm):
    rows = torch.eye(16)[:2]
    assert listed_logits(random_lm(), "mlp_in.1", rows, 3) == [{}, {}]
    assert in_stream(random_lm(), "resid.1", rows) is rows


def test_listed_logits_are_the_extremes(tmp_path, toy_manifest, toy_lm):
    entry = described(tmp_path, world(tmp_path, toy_manifest, coordinates())).by_number[5]["logits"]
    weights = logit_weights(toy_lm(), torch.eye(WIDTH)[5:6])[0]
    assert [item["id"] for item in entry["top"]] == torch.argsort(weights, descending=True)[:4].tolist()
    assert [item["id"] for item in entry["bottom"]] == torch.argsort(weights)[:4].tolist()
    assert entry["bottom"][0]["weight"] == pytest.approx(float(weights.min()), rel=1e-4)


def test_best_places_keep_one_per_group_and_feature():
    best = BestPlaces(2)
    groups = np.array([0, 0, 1, 2])
    entries = [(0, 0, 1.0), (1, 0, 5.0), (1, 1, 2.0), (2, 0, 4.0), (3, 0, 3.0), (3, 1, 9.0)]
    for row, place, value in entries:  # one at a time: later, weaker entries must not push stronger ones out
        best.add(Firing(np.array([row]), np.array([place]), np.array([value])), groups, 10)
    assert best.of(0) == [11, 12]
    assert best.of(1) == [13, 11]


def test_tally_and_strengths_with_signs():
    fired = Firing(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([-4.0, 1.0, 2.0]))
    tally, strengths = TokenTally(10), Strengths(2)
    tally.add(fired, np.array([7, 3, 3]))
    strengths.add(fired, 3)
    assert [(entry["id"], entry["mean"]) for entry in tally.top(0, 5)] == [(7, -4), (3, 1)]
    assert tally.top(1, 5) == [{"id": 3, "mean": 2, "share": 0.5, "n": 1}]
    assert (strengths.of(0)["max"], strengths.of(0)["mean_active"]) == (4, 2.5)


@pytest.mark.parametrize(
    ("token", "shown"), [(" are", "·are"), ("\n\n", "↵↵"), ("", "∅"), ("\x07", "\\u0007"), ("é", "é")]
)
def test_every_token_can_be_seen(token, shown):
    assert visible(token) == shown


def test_distinct_tokens_ignore_case_and_space():
    assert distinct([" the", "The", " a", "the ", " ", "\n"], 4) == [" the", " a", " ", "\n"]


def test_sentencepiece_words_keep_their_space():
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: {1: "are", 2: "re"}[ids[0]],
        convert_ids_to_tokens=lambda token: {1: "▁are", 2: "re"}[token],
    )
    assert [token_text(tokenizer, token) for token in (1, 2)] == [" are", "re"]

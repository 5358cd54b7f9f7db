"""Features held at other values: the model against what its graph predicts, and against the definition."""

import numpy as np
import pytest
import torch

from circuitflow.errors import UserError
from circuitflow.graphs.intervening import OPEN, Held, Mode, Prompt
from circuitflow.graphs.prediction import predicted
from circuitflow.models.holding import holding, recording
from circuitflow.models.running import run
from tests.fixtures.graph_examples import autograd_graph, random_family

TOKENS = [5, 9, 3, 12, 7]
LOGITS = [4, 11]
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")
EVERYTHING = 1  # the last layer of the random models


def _changes(prompt, graph, held):
    """Measured change of every target of the graph under what is held, everything frozen."""
    after = prompt.run(held, Mode(True, True, EVERYTHING))
    features = [tuple(map(int, row)) for row in graph.features]
    before, now = (prompt.pre_activations(one, features) for one in (prompt.clean, after))
    shift = after.logits - prompt.clean.logits
    return torch.cat([now - before, (shift - shift.mean())[LOGITS]]).numpy()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_with_everything_frozen_effects_are_the_graphs_edges(random_lm, architecture):
    lm = random_lm(architecture)
    family = random_family(lm)
    graph = autograd_graph(lm, family, TOKENS, LOGITS)
    prompt = Prompt(lm, family, TOKENS)
    source = int(np.abs(graph.weights[-1, : graph.first_error]).argmax())
    layer, position, feature = map(int, graph.features[source])
    own = prompt.activation(layer, position, feature)
    assert own == pytest.approx(graph.activations[source], rel=1e-9)
    for multiple in (0.0, 2.0, -1.5):
        moved = _changes(prompt, graph, [Held(layer, position, feature, multiple * own)])
        wanted = predicted(graph, {source: multiple}, EVERYTHING)
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(moved, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", [{"cross": True}, {"skip": True}, {"cross": True, "skip": True}])
def test_cross_layer_and_skip_transcoders_too(random_lm, kind):
    lm = random_lm("llama")
    family = random_family(lm, **kind)
    graph = autograd_graph(lm, family, TOKENS, LOGITS)
    prompt = Prompt(lm, family, TOKENS)
    sources = np.flatnonzero(graph.features[:, 0] == 0)[:2]
    held = [Held(*map(int, graph.features[one]), 3.0 * graph.activations[one]) for one in sources]
    np.testing.assert_allclose(
        _changes(prompt, graph, held), predicted(graph, dict.fromkeys(sources, 3.0), EVERYTHING), atol=1e-9
    )


def test_without_a_change_nothing_moves(random_lm):
    for architecture in ("llama", "gpt2", "gpt_neox", "gemma3_text"):
        lm = random_lm(architecture)
        prompt = Prompt(lm, random_family(lm), TOKENS)
        for mode in (Mode(), Mode(False, False), Mode(True, True, EVERYTHING)):
            torch.testing.assert_close(prompt.run([], mode).logits, prompt.clean.logits)


def test_open_run_is_the_model_with_the_features_decoder_rows_added(random_lm):
    lm = random_lm("llama")
    family = random_family(lm)
    prompt = Prompt(lm, family, TOKENS)
    at = int(prompt.codes[0].rows()[0])
    feature = int(prompt.codes[0].features[0])
    own = prompt.activation(0, at, feature)
    delta = torch.zeros(1, len(TOKENS), lm.d_model, dtype=lm.dtype)
    delta[0, at] = 1.5 * own * family.members[0].W_dec[feature]
    found = run(
        lm,
        torch.tensor([TOKENS]),
        torch.ones(1, len(TOKENS), dtype=torch.bool),
        replace={"mlp.0": lambda value: value + delta},
    )
    got = prompt.run([Held(0, at, feature, 2.5 * own)], Mode(False, False, OPEN)).logits
    torch.testing.assert_close(got, lm.unembed(found.last)[0, -1])
    frozen = prompt.run([Held(0, at, feature, 2.5 * own)], Mode(True, True, OPEN)).logits
    assert float((got - frozen).abs().max()) > 1e-4


def test_a_held_feature_does_not_respond_to_another(random_lm):
    """Later one held at its own value: the earlier one's effect through it is taken out in full."""
    lm = random_lm("llama")
    family = random_family(lm)
    prompt = Prompt(lm, family, TOKENS)
    first = Held(0, 0, int(prompt.codes[0].features[0]), 0.0)
    later = [
        Held(1, int(row), int(feature), float(value))
        for row, feature, value in zip(
            prompt.codes[1].rows(), prompt.codes[1].features, prompt.codes[1].values, strict=True
        )
    ]
    alone = prompt.run([first], Mode(False, False))
    both = prompt.run([first, *later], Mode(False, False))
    codes = family.members[1].encode(alone.read[1], prompt.positions).dense()
    clean = prompt.codes[1].dense()
    kept = clean != 0
    moved = (torch.where(kept, clean - codes, 0) @ family.members[1].W_dec)[-1]
    last = f"resid.{lm.n_layers - 1}"
    # In the last layer what is held reaches the logits alone, so that the difference can be made by hand.
    streams = []
    for change in (moved, torch.zeros_like(moved)):

        def hold(value, change=change):
            out = value.clone()
            out[0, -1] += change
            return out

        delta = -prompt.activation(0, 0, first.feature) * family.members[0].W_dec[first.feature]

        def remove(value, delta=delta):
            out = value.clone()
            out[0, 0] += delta
            return out

        found = run(lm, prompt.tokens, prompt.mask, capture=[last], replace={"mlp.0": remove, "mlp.1": hold})
        streams.append(lm.unembed(found.last)[0, -1])
    torch.testing.assert_close(both.logits, streams[0])
    torch.testing.assert_close(alone.logits, streams[1])


def test_mlps_up_to_a_layer_keep_to_the_untouched_run(random_lm):
    """Up to layer 0 the first MLP is held and the second responds; by hand with the model's own parts."""
    lm = random_lm("gpt2")
    family = random_family(lm)
    prompt = Prompt(lm, family, TOKENS)
    feature = int(prompt.codes[0].features[0])
    held = [Held(0, 0, feature, 0.0)]
    after = prompt.run(held, Mode(False, False, 0)).logits
    open_one = prompt.run(held, Mode(False, False, OPEN)).logits
    # The first MLP sees nothing of a change at its own output, so holding it changes nothing.
    torch.testing.assert_close(after, open_one)
    closed = prompt.run(held, Mode(False, False, 1)).logits
    assert float((closed - after).abs().max()) > 1e-5


def test_prediction_runs_through_features_that_respond(random_lm):
    lm = random_lm("llama")
    graph = autograd_graph(lm, random_family(lm), TOKENS, LOGITS)
    source = 0
    n_f = graph.first_error
    N = np.zeros((n_f, n_f))
    N[:, :] = graph.weights[:n_f, :n_f] / graph.activations[:, None]
    share = np.linalg.solve(np.eye(n_f) - N, np.eye(n_f)[source])  # all paths at once
    np.testing.assert_allclose(
        predicted(graph, {source: 2.0}, OPEN)[n_f:], graph.weights[n_f:, :n_f] @ share, rtol=1e-9
    )
    direct = predicted(graph, {source: 2.0}, EVERYTHING)
    np.testing.assert_allclose(direct, graph.weights[:, source], rtol=1e-12)


def test_held_features_stop_predicted_paths():
    from circuitflow.graphs.graph import Graph

    weights = np.zeros((3, 5))
    weights[1, 0] = 2.0  # feature 0 -> feature 1, whose activation is 4: half of it
    weights[2, 1] = 6.0  # feature 1 -> logit
    weights[2, 0] = 1.0
    graph = Graph(
        prompt="p", tokens=("a", "b"), token_ids=np.array([0, 1]),
        features=np.array([[0, 0, 7], [1, 1, 8]]), activations=np.array([1.0, 4.0]),
        errors=np.zeros((0, 2), np.int64), logits=np.array([3]), logit_tokens=("x",),
        probabilities=np.array([1.0]), targets=np.array([0, 1, 4]), weights=weights, bias=np.zeros(3),
    )  # fmt: skip
    # Feature 0 removed: −1 directly, and −½ · 6 through feature 1.
    np.testing.assert_allclose(predicted(graph, {0: 0.0}, OPEN), [0, -2, -4])
    np.testing.assert_allclose(predicted(graph, {0: 0.0}, 1), [0, -2, -1])
    np.testing.assert_allclose(predicted(graph, {0: 0.0, 1: 1.0}, OPEN), [0, -2, -1])
    np.testing.assert_allclose(predicted(graph, {0: 0.0, 1: 3.0}, OPEN), [0, -2, 11])


def test_recorded_patterns_are_the_models(random_lm):
    for architecture in ("llama", "gemma2"):
        lm = random_lm(architecture)
        tokens, mask = torch.tensor([TOKENS]), torch.ones(1, len(TOKENS), dtype=torch.bool)
        with recording(lm) as found:
            plain = run(lm, tokens, mask).last
        torch.testing.assert_close(plain, run(lm, tokens, mask).last)
        for pattern in found.patterns.values():
            assert pattern.shape == (1, 4, len(TOKENS), len(TOKENS))
            torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
            assert float(pattern.triu(1).abs().max()) == 0
        with holding(lm, found, attention=True, norms_too=True):
            torch.testing.assert_close(run(lm, tokens, mask).last, plain)
            # Held, the map from stream to stream is affine.
            start = run(lm, tokens, mask, capture=["embed"], stop_at="embed").sites["embed"]
            noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=lm.dtype)
            blocked = {f"mlp.{layer}": torch.zeros_like for layer in range(lm.n_layers)}
            ends = [
                run(lm, tokens, mask, start=("embed", start + t * noise), replace=blocked).last
                for t in (0, 1, 2)
            ]
        torch.testing.assert_close(ends[2] - ends[1], ends[1] - ends[0])
        torch.testing.assert_close(run(lm, tokens, mask).last, plain)  # nothing stays behind


def test_what_does_not_exist_is_named(random_lm):
    lm = random_lm("llama")
    prompt = Prompt(lm, random_family(lm), TOKENS)
    for held, said in (
        (Held(7, 0, 0, 1.0), "Layer 7 has no transcoder"),
        (Held(0, 9, 0, 1.0), "position 9"),
        (Held(0, 0, 99, 1.0), "24 features"),
    ):
        with pytest.raises(UserError, match=said):
            prompt.run([held], Mode())

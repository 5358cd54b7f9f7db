"""Objectives of the trained kinds: gradients, examples worked by hand, planted dictionaries, what inference gets."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitflow.dictionaries import gradients as chunks
from circuitflow.dictionaries.batchtopk import RATE, BatchTopK
from circuitflow.dictionaries.codes import Codes, decode_codes
from circuitflow.dictionaries.gated import Gated
from circuitflow.dictionaries.gradients import pre_activations
from circuitflow.dictionaries.jumprelu import PACE, JumpReLU
from circuitflow.dictionaries.kinds import TRAINED, Request
from circuitflow.dictionaries.objective import Context, Finished, Objective, Step
from circuitflow.dictionaries.relu import ReLU
from circuitflow.dictionaries.selection import selection
from circuitflow.dictionaries.settings import Settings
from circuitflow.dictionaries.topk import AuxK, TopK
from circuitflow.dictionaries.trainer import Schedule, Trainer, first_weights
from tests.fixtures.dense_objectives import (
    Losses,
    Weights,
    dense_batchtopk,
    dense_gated,
    dense_jumprelu,
    dense_relu,
    dense_topk,
)
from tests.fixtures.planted import mean_max_cosine, planted_batches, planted_rows

D_MODEL, D_DICT, BATCH = 5, 12, 16


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    objective: Objective
    dense: Callable[[Weights, Tensor, Context], Losses]
    dead: int = 0


def case(objective: Any, dense: Callable[..., Losses], dead: int = 0) -> Case:
    return Case(objective, partial(dense, objective), dead)


NO_AUX, AUX = AuxK(2, 0.0), AuxK(2, 0.5)
CASES = {
    "topk": case(TopK(3, NO_AUX), dense_topk),
    "topk, one dead": case(TopK(3, AUX), dense_topk, dead=1),
    "topk, five dead": case(TopK(3, AUX), dense_topk, dead=5),
    "batchtopk": case(BatchTopK(3, NO_AUX), dense_batchtopk),
    "batchtopk, five dead": case(BatchTopK(3, AUX), dense_batchtopk, dead=5),
    "matryoshka": case(BatchTopK(3, NO_AUX, (0.25, 0.5, 1.0)), dense_batchtopk),
    "matryoshka, five dead": case(BatchTopK(3, AUX, (0.25, 0.5, 1.0)), dense_batchtopk, dead=5),
    "relu": case(ReLU(0.3, -0.1), dense_relu),
    "jumprelu": case(JumpReLU(0.3, 0.8, 0.5), dense_jumprelu),
    "jumprelu, wide window": case(JumpReLU(0.3, 3.0, 0.5), dense_jumprelu),  # reaches below 0
    "jumprelu, target": case(JumpReLU(0.3, 0.8, 0.5, target_l0=2.0), dense_jumprelu),
    "gated": case(Gated(0.3, -0.1), dense_gated),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SMOOTH = ("W_enc", "b_enc", "W_dec", "b_dec", "b_mag", "log_scale")


def weights_for(objective: Objective) -> Weights:
    """Random weights, decoder norms all over the place; what is tracked as at first."""
    draw = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D_DICT, D_MODEL), "b_enc": (D_DICT,), "W_dec": (D_DICT, D_MODEL), "b_dec": (D_MODEL,)}
    weights = {
        name: torch.randn(*shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()
    }
    for name, tensor in objective.extra_weights(D_DICT).items():
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        weights[name] = tensor.double() + (0.05 if name == "log_threshold" else 0.5) * noise
    return weights | objective.tracked(D_DICT)


def batch(n: int = BATCH) -> Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def context(case: Case, sparsity: float = 0.7) -> Context:
    return Context(torch.arange(D_DICT) < case.dead, 0.5, sparsity)


def loss(step: Step) -> Tensor:
    return step.reconstruction + step.auxiliary


# --- gradients ---


@each_case
def test_gradients_are_those_of_autograd(case):
    w, x, where = weights_for(case.objective), batch(), context(case)
    step = case.objective.step(w, x, where)
    tracked = case.objective.tracked(D_DICT)
    leaves = {name: tensor.clone().requires_grad_(name not in tracked) for name, tensor in w.items()}
    losses = case.dense(leaves, x, where)
    (losses.reconstruction + losses.auxiliary).backward()
    torch.testing.assert_close(step.reconstruction, losses.reconstruction.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(step.auxiliary, losses.auxiliary.detach(), rtol=1e-12, atol=0)
    assert set(step.gradients) == set(w) - set(tracked)
    for name, gradient in step.gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.dead])
def test_smooth_gradients_are_those_of_finite_differences(name):
    """Along random directions.

    What is held fixed is no function of the weights: AuxK's error (left to the test above), and the decoder that
    Gated freezes.
    """
    case, x, draw = CASES[name], batch(), torch.Generator().manual_seed(5)
    w, where = weights_for(case.objective), context(case)
    step = case.objective.step(w, x, where)
    for weight in (name for name in SMOOTH if name in step.gradients):
        frozen = isinstance(case.objective, Gated) and weight in ("W_dec", "b_dec")
        direction = torch.randn(w[weight].shape, generator=draw, dtype=torch.float64)
        ends = []
        for move in (1e-6, -1e-6):
            moved = case.objective.step({**w, weight: w[weight] + move * direction}, x, where)
            ends.append(float(moved.reconstruction if frozen else loss(moved)))
        slope = float((step.gradients[weight] * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)


def test_the_loss_falls_along_the_straight_through_gradient():
    """The estimators are no derivatives, but with a wide window a step along them lowers the true loss."""
    for target in (None, 2.0):
        objective = JumpReLU(0.3, 0.8, 0.5, target)
        w, x, where = weights_for(objective), batch(512), Context(torch.zeros(D_DICT, dtype=torch.bool), 0.5)
        step = objective.step(w, x, where)
        moved = {**w, "log_threshold": w["log_threshold"] - 1e-4 * step.gradients["log_threshold"]}
        assert float(loss(objective.step(moved, x, where))) < float(loss(step))


@each_case
def test_a_step_tells_what_fired_and_changes_nothing(case):
    w, x, where = weights_for(case.objective), batch(), context(case)
    before = {name: tensor.clone() for name, tensor in w.items()}
    step = case.objective.step(w, x, where)
    features = case.dense(w, x, where).features
    assert torch.equal(step.fired, (features != 0).any(dim=0))
    assert step.active == int((features != 0).sum())
    assert 0 < step.active < features.numel()
    assert all(torch.equal(w[name], tensor) for name, tensor in before.items())


@each_case
def test_blocks_of_the_encoder_do_not_matter(case, monkeypatch):
    w, x, where = weights_for(case.objective), batch(100), context(case)
    whole = case.objective.step(w, x, where)
    monkeypatch.setattr(chunks, "FEWEST_ROWS", 7)
    monkeypatch.setattr(chunks, "CPU_ENTRIES", 7 * D_DICT)
    assert len(list(chunks.encoder_chunks(w, x))) == 15
    cut = case.objective.step(w, x, where)
    assert torch.equal(cut.fired, whole.fired)
    torch.testing.assert_close(cut.gradients, whole.gradients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(cut.tracked), dict(whole.tracked))


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_penalties_are_scaled_while_they_warm_up(kind):
    case = CASES[kind]
    w, x = weights_for(case.objective), batch()
    none, half, full = (case.objective.step(w, x, context(case, sparsity)) for sparsity in (0.0, 0.5, 1.0))
    assert float(full.auxiliary) > float(none.auxiliary)
    for name, gradient in half.gradients.items():
        middle = (none.gradients[name] + full.gradients[name]) / 2
        torch.testing.assert_close(gradient, middle, rtol=1e-10, atol=1e-12)


@each_case
def test_a_batch_without_an_active_feature(case):
    w, x, where = weights_for(case.objective), batch(), context(replace(case, dead=0))
    w["b_enc"] = torch.full_like(w["b_enc"], -1e3)
    step = case.objective.step(w, x, where)
    assert step.active == 0
    assert not step.fired.any()
    assert not step.gradients["W_dec"].any()
    expected = (x - w["b_dec"]).square().sum() / len(x)
    torch.testing.assert_close(step.reconstruction, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dict(step.tracked), case.objective.tracked(D_DICT))


# --- examples worked by hand: two features along the axes ---

NOBODY = Context(torch.zeros(2, dtype=torch.bool), 0.0)


def axes(**changes: Any) -> Weights:
    plain = {
        "W_enc": [[1, 0], [0, 1]],
        "b_enc": [0, 0],
        "W_dec": [[1, 0], [0, 1]],
        "b_dec": [0, 0],
        **changes,
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in plain.items()}


def check(step: Step, reconstruction: float, auxiliary: float, **expected: Any) -> None:
    assert float(step.reconstruction) == pytest.approx(reconstruction)
    assert float(step.auxiliary) == pytest.approx(auxiliary)
    for name, values in expected.items():
        got = step.gradients[name]
        torch.testing.assert_close(got, torch.tensor(values, dtype=got.dtype), msg=f"{name}: {got}")


def test_topk_by_hand():
    # f = (3, 0): the larger of (3, 2). x̂ − x = (0, −2).
    step = TopK(1, NO_AUX).step(axes(), torch.tensor([[3.0, 2.0]]).double(), NOBODY)
    check(step, 4, 0, W_enc=[[0, 0], [0, 0]], W_dec=[[0, -12], [0, 0]], b_dec=[0, -4])


X_TWO = torch.tensor([[3.0, 2.0], [1.0, -1.0]]).double()


def test_batchtopk_by_hand():
    # The two largest of (3, 2; 1, −1) belong to the first vector. x̂ − x = (0, 0; −1, 1), halved over the batch.
    w = axes() | {"threshold": torch.tensor(-1.0)}
    step = BatchTopK(1, NO_AUX).step(w, X_TWO, NOBODY)
    check(step, 1, 0, W_enc=[[0, 0], [0, 0]], W_dec=[[0, 0], [0, 0]], b_dec=[-1, 1])
    assert float(step.tracked["threshold"]) == 2
    again = BatchTopK(1, NO_AUX).step({**w, "threshold": torch.tensor(3.0)}, X_TWO, NOBODY)
    assert float(again.tracked["threshold"]) == pytest.approx(3 - RATE)  # RATE of the way from 3 to 2


def test_matryoshka_by_hand():
    # Feature 0 alone: x̂ − x = (0, −2; −1, 1), mean square 3; both: (0, 0; −1, 1), mean square 1.
    # Feature 0 sees both errors, (0, −2) at the vector where its value is 3.
    step = BatchTopK(1, NO_AUX, (0.5, 1.0)).step(axes() | {"threshold": torch.tensor(-1.0)}, X_TWO, NOBODY)
    check(step, 1, 3, W_enc=[[0, 0], [0, 0]], W_dec=[[0, -6], [0, 0]], b_dec=[-2, 0])


def test_relu_by_hand():
    # f = (1, 0), decoder norm 2: x̂ − x = (1, 0), L1 = 2. ∂/∂f = 2·2 + .1·2; the norm's gradient is .1·f along the row.
    w = axes(W_dec=[[2, 0], [0, 1]])
    step = ReLU(0.1, 0.0).step(w, torch.tensor([[1.0, -1.0]]).double(), NOBODY)
    check(step, 2, 0.2, W_enc=[[4.2, -4.2], [0, 0]], b_enc=[4.2, 0], W_dec=[[2.1, 2], [0, 0]], b_dec=[2, 2])


def test_jumprelu_by_hand():
    # θ = .5, window (.3, .7): both features are in it, one active. x̂ − x = (0, −.4), so ∂/∂f = (0, −.8).
    # ∂/∂θ = −(θ·∂/∂f + slope of the penalty)/.4, times θ for the logarithm.
    w = axes(log_threshold=[math.log(0.5) / PACE] * 2)
    x = torch.tensor([[0.6, 0.4]]).double()
    step = JumpReLU(0.1, 0.4, 0.5).step(w, x, NOBODY)
    by_threshold = [-(0 + 0.1) / 0.4, -(0.5 * -0.8 + 0.1) / 0.4]
    check(step, 0.16, 0.1, W_enc=[[0, 0], [0, 0]], W_dec=[[0, -0.48], [0, 0]], b_dec=[0, -0.8],
          log_threshold=[PACE * 0.5 * slope for slope in by_threshold])  # fmt: skip
    aiming = JumpReLU(0.1, 0.4, 0.5, target_l0=2.0).step(w, x, NOBODY)  # slope 2·.1·(1/2 − 1)/2 = −.05
    by_threshold = [-(0 - 0.05) / 0.4, -(0.5 * -0.8 - 0.05) / 0.4]
    check(aiming, 0.16, 0.025, log_threshold=[PACE * 0.5 * slope for slope in by_threshold])


def test_gated_by_hand():
    # π = (.5, −1.5); f = (2·1 − .4, 0) = (1.6, 0), so x̂ − x = (.6, 1). relu(π) decodes to (.5, 0): error (−.5, 1).
    # ∂/∂f = 1.2; ∂/∂π = −1 + .1; W_enc gets 2·1.2 − .9 along x, r gets 1.2·2.
    w = axes(b_enc=[-0.5, -0.5], b_mag=[-0.4, 0], log_scale=[math.log(2), 0])
    step = Gated(0.1, 0.0).step(w, torch.tensor([[1.0, -1.0]]).double(), NOBODY)
    check(step, 1.36, 1.25 + 0.05, W_enc=[[1.5, -1.5], [0, 0]], b_enc=[-0.9, 0], b_mag=[1.2, 0], log_scale=[2.4, 0],
          W_dec=[[1.92, 3.2], [0, 0]], b_dec=[1.2, 2])  # fmt: skip


# --- planted dictionaries ---

FEATURES, WIDTH, ACTIVE, STEPS = 32, 24, 3, 500
PENALTIES = {"relu": 0.2, "jumprelu": 0.03, "gated": 0.6}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_planted_dictionary_is_found(kind):
    rows = planted_rows(FEATURES, WIDTH, seed=7)  # not the seed of the first weights
    values = {
        "kind": kind, "d_dict": 2 * FEATURES, "k": ACTIVE, "penalty": PENALTIES.get(kind), "prefixes": [0.75, 1.0],
        "training": {"auxk_weight": 1 / 32},
    }  # fmt: skip
    objective = TRAINED[kind](Request("resid.1", WIDTH, Settings.of(values)))
    weights = first_weights(objective, WIDTH, 2 * FEATURES, seed=0)
    start = mean_max_cosine(rows, weights["W_dec"])
    trainer = Trainer(objective, weights, Schedule(4e-3, STEPS, 0.05, 0.2, 0.2), dead_after=3000)
    for x in planted_batches(rows, ACTIVE, STEPS, batch=256, seed=1):
        trainer.step(x)
    found = mean_max_cosine(rows, objective.finish(weights).weights["W_dec"])
    assert start < 0.7
    assert found > 0.95


# --- the way to inference ---


def encode(objective: Objective, done: Finished, x: Tensor) -> Codes:
    return selection(objective.select)(pre_activations(done.weights, x), done.settings, done.extra)


@each_case
def test_finished_weights_reproduce_the_features_of_training(case):
    w, x, where = weights_for(case.objective), batch(), context(case)
    step = case.objective.step(w, x, where)
    done = case.objective.finish(w | dict(step.tracked))
    losses = case.dense(w, x, where)
    features = losses.features
    norms = w["W_dec"].norm(dim=1)
    if not case.objective.unit_decoder:
        features = features * norms
        torch.testing.assert_close(done.weights["W_dec"].norm(dim=1), torch.ones_like(norms))
    if isinstance(case.objective, BatchTopK):
        smallest = features[features > 0].min()  # the threshold itself, after one step: no longer active
        torch.testing.assert_close(done.extra["threshold"], smallest.expand(D_DICT), rtol=1e-12, atol=0)
        features = torch.where(features <= smallest, 0, features)
    codes = encode(case.objective, done, x)
    torch.testing.assert_close(codes.dense(), features, rtol=1e-12, atol=1e-12)
    if not isinstance(case.objective, BatchTopK):
        error = x - decode_codes(codes, done.weights["W_dec"]) - done.weights["b_dec"]
        torch.testing.assert_close(error.square().sum() / len(x), losses.reconstruction)
    alone = [encode(case.objective, done, row[None]).dense() for row in x]
    torch.testing.assert_close(torch.cat(alone), codes.dense(), rtol=1e-12, atol=1e-12)


def test_decoder_rows_of_norm_zero_are_left():
    objective = ReLU(0.1, 0.0)
    w = weights_for(objective)
    w["W_dec"][3] = 0
    done = objective.finish(w)
    assert torch.equal(done.weights["W_enc"][3], w["W_enc"][3])
    assert not done.weights["W_dec"][3].any()
    step = objective.step(w, batch(), Context(torch.zeros(D_DICT, dtype=torch.bool), 0.5))
    assert all(gradient.isfinite().all() for gradient in step.gradients.values())


def test_a_threshold_that_was_never_seen_is_zero():
    objective = BatchTopK(3, NO_AUX)
    assert torch.equal(objective.finish(weights_for(objective)).extra["threshold"], torch.zeros(D_DICT))


def test_k_anneals():
    objective = BatchTopK(2, NO_AUX, k_start=6, k_anneal=0.5)
    w, x = weights_for(objective), batch(40)
    w["b_enc"] += 3  # enough positive entries
    nobody = torch.zeros(D_DICT, dtype=torch.bool)
    active = [objective.step(w, x, Context(nobody, done)).active / 40 for done in (0.0, 0.25, 0.5, 1.0)]
    assert active == [6, 4, 2, 2]

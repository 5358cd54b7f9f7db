"""Objectives of dictionaries that span sites, against dense losses that autograd differentiates."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitflow.dictionaries.batchtopk import BatchTopK
from circuitflow.dictionaries.joint import Joint, Skipping
from circuitflow.dictionaries.jumprelu import PACE, JumpReLU
from circuitflow.dictionaries.objective import Context, Objective
from circuitflow.dictionaries.relu import ReLU
from circuitflow.dictionaries.saturating import Saturating
from circuitflow.dictionaries.topk import AuxK, TopK
from tests.fixtures.dense_objectives import Count, Jump

D, D_DICT, N, LAYERS = 5, 12, 16, 3
AUX = AuxK(2, 0.5)
Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dense_member(kind: Any, w: Weights, x: Tensor, dead: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """Features, and what the kind adds to the loss but for AuxK."""
    pre, none = x @ w["W_enc"].T + w["b_enc"], x.new_zeros(())
    if isinstance(kind, TopK | BatchTopK):
        kept = torch.zeros_like(pre)
        if isinstance(kind, TopK):
            kept = kept.scatter(1, pre.topk(kind.k).indices, 1.0)
        else:
            kept.view(-1)[pre.flatten().topk(kind.k * len(x)).indices] = 1.0
        return torch.relu(pre) * kept, none
    if isinstance(kind, ReLU):
        norms = w["W_dec"].unflatten(1, (kind.sites, -1)).norm(dim=2).sum(dim=1)
        features = torch.relu(pre)
        return features, sparsity * kind.penalty * (features * norms).sum() / len(x)
    if isinstance(kind, JumpReLU):
        threshold = (PACE * w["log_threshold"]).exp()
        count = Count.apply(pre, threshold, kind.bandwidth).sum() / len(x)
        return Jump.apply(pre, threshold, kind.bandwidth), sparsity * kind.penalty * count
    assert isinstance(kind, Saturating)
    jumps = "log_threshold" in w
    threshold = (PACE * w["log_threshold"]).exp() if jumps else torch.zeros(D_DICT, dtype=x.dtype)
    features = Jump.apply(pre, threshold, kind.bandwidth) if jumps else torch.relu(pre)
    norms = w["W_dec"].norm(dim=1)
    height = torch.tanh(kind.saturation * norms * features).sum() / len(x)
    below = (torch.relu(threshold - pre) * norms)[:, dead].sum() / len(x)
    return features, sparsity * kind.penalty * height + kind.dead_weight * below


def dense_auxk(kind: Any, w: Weights, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    if not isinstance(kind, TopK | BatchTopK):
        return x.new_zeros(())
    pre = (x @ w["W_enc"].T + w["b_enc"])[:, dead]
    kept = torch.zeros_like(pre).scatter(1, pre.topk(min(kind.aux.k, pre.shape[1])).indices, 1.0)
    left = error - (torch.relu(pre) * kept) @ w["W_dec"][dead]
    return kind.aux.weight * left.square().sum() / error.square().sum()


@dataclass(frozen=True)
class Case:
    """An objective and its shape: inputs and outputs of each member, in sites."""

    objective: Objective
    members: list[Any]
    reads: int = 1
    first: tuple[int, ...] = (0,)
    outputs: int = 1

    @property
    def joint(self) -> bool:
        return len(self.members) > 1

    @property
    def skip(self) -> bool:
        return isinstance(self.objective, Skipping) or getattr(self.objective, "skip", False)

    def own(self, weights: Weights, m: int) -> Weights:
        if not self.joint:
            return weights
        return {name[2:]: tensor for name, tensor in weights.items() if name.startswith(f"{m}.")}

    def weights(self) -> Weights:
        draw = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        made: Weights = {"b_dec": normal(self.outputs * D)}
        for m, first in enumerate(self.first):
            start = f"{m}." if self.joint else ""
            made[f"{start}W_enc"] = normal(D_DICT, self.reads * D)
            made[f"{start}b_enc"] = normal(D_DICT)
            made[f"{start}W_dec"] = normal(D_DICT, (self.outputs - first) * D)
        for name, tensor in self.objective.extra_weights(D_DICT).items():
            size = 0.05 if name.endswith("log_threshold") else 0.5
            made[name] = tensor.double() + size * normal(*tensor.shape)
        return made | self.objective.tracked(D_DICT)

    def batch(self) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(4)
        shape = N, (len(self.members) if self.joint else self.reads) * D
        x = torch.randn(*shape, generator=draw, dtype=torch.float64)
        return x, torch.randn(N, self.outputs * D, generator=draw, dtype=torch.float64)

    def dense(self, w: Weights, x: Tensor, y: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Features of all members side by side, reconstruction and the rest of the loss."""
        decoded, added, found = w["b_dec"].expand_as(y), x.new_zeros(()), []
        inputs = x.split(D, dim=1) if self.joint else (x,)
        dead = context.dead.split(D_DICT)
        for m, kind in enumerate(self.members):
            own, at = self.own(w, m), self.first[m] * D
            features, more = dense_member(kind, own, inputs[m], dead[m], context.sparsity)
            found.append(features)
            part = features @ own["W_dec"]
            if self.skip:
                width = D if self.joint else self.outputs * D
                part = part + torch.nn.functional.pad(inputs[m] @ own["W_skip"].T, (0, part.shape[1] - width))
            decoded = decoded + torch.nn.functional.pad(part, (at, 0))
            added = added + more
        error = (y - decoded).detach()
        for m, kind in enumerate(self.members):
            left = error[:, self.first[m] * D :]
            added = added + dense_auxk(kind, self.own(w, m), inputs[m], left, dead[m])
        return torch.cat(found, dim=1), (y - decoded).square().sum() / N, added


def kinds(sites: int) -> dict[str, Any]:
    return {
        "topk": TopK(3, AUX),
        "batchtopk": BatchTopK(3, AUX),
        "relu": ReLU(0.3, -0.1, sites=sites),
        "jumprelu": JumpReLU(0.3, 0.8, 0.5),
    }


def saturating(jumps: bool) -> Saturating:
    return Saturating(0.3, 0.4, 0.2, -0.1, 0.5 if jumps else None, 0.8)


def cases() -> dict[str, Case]:
    made: dict[str, Case] = {}
    for name, kind in kinds(1).items():
        made[f"transcoder {name}"] = Case(kind, [kind])
        made[f"skip {name}"] = Case(Skipping(kind, D, D), [kind])
    for name, kind in kinds(3).items():
        made[f"crosscoder {name}"] = Case(kind, [kind], 3, (0,), 3)
    across = {"topk": TopK(3, AUX), "batchtopk": BatchTopK(3, AUX)}
    across |= {"relu": saturating(False), "jumprelu": saturating(True)}
    first = tuple(range(LAYERS))
    for name, kind in across.items():
        for skip in (False, True):
            joint = Joint((kind,) * LAYERS, D, first, LAYERS, D_DICT, skip)
            title = f"cross-layer {name}{', skip' if skip else ''}"
            made[title] = Case(joint, [kind] * LAYERS, 1, first, LAYERS)
    return made


CASES = cases()
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def context(case: Case) -> Context:
    dead = (torch.arange(D_DICT) < 4).repeat(len(case.members))
    return Context(dead, 0.5, 0.7)


@each_case
def test_gradients_are_those_of_autograd(case: Case):
    w, (x, y), where = case.weights(), case.batch(), context(case)
    step = case.objective.step(w, x, where, y)
    tracked = case.objective.tracked(D_DICT)
    leaves = {name: tensor.clone().requires_grad_(name not in tracked) for name, tensor in w.items()}
    features, reconstruction, auxiliary = case.dense(leaves, x, y, where)
    (reconstruction + auxiliary).backward()
    torch.testing.assert_close(step.reconstruction, reconstruction.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(step.auxiliary, auxiliary.detach(), rtol=1e-12, atol=0)
    assert set(step.gradients) == set(w) - set(tracked)
    for name, gradient in step.gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=1e-10, atol=1e-12)
    assert torch.equal(step.fired, (features != 0).any(dim=0))
    assert step.active == int((features != 0).sum())


@each_case
def test_a_step_changes_no_weight(case: Case):
    w, (x, y) = case.weights(), case.batch()
    before = {name: tensor.clone() for name, tensor in w.items()}
    x_before, y_before = x.clone(), y.clone()
    case.objective.step(w, x, context(case), y)
    assert all(torch.equal(w[name], tensor) for name, tensor in before.items())
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)


def test_a_cross_layer_transcoder_worked_by_hand():
    """Two layers of one coordinate: layer 0 writes 2 and 3 times its feature, layer 1 adds 5 times its own."""
    none = TopK(1, AuxK(1, 0.0))
    joint = Joint((none, none), 1, (0, 1), 2, 1)
    w = {"b_dec": torch.tensor([0.5, -0.5]), "0.W_enc": torch.ones(1, 1), "0.b_enc": torch.zeros(1)}
    w |= {"0.W_dec": torch.tensor([[2.0, 3.0]]), "1.W_enc": torch.ones(1, 1), "1.b_enc": torch.zeros(1)}
    w |= {"1.W_dec": torch.tensor([[5.0]])}
    # f = (1, 2): ŷ = (2·1 + .5, 3·1 + 5·2 − .5) = (2.5, 12.5)
    step = joint.step(
        w, torch.tensor([[1.0, 2.0]]), Context(torch.zeros(2).bool(), 0.0), torch.tensor([[2.0, 12.0]])
    )
    assert float(step.reconstruction) == pytest.approx(0.5)  # .5² + .5²
    assert step.gradients["b_dec"].tolist() == pytest.approx([1.0, 1.0])  # 2·(ŷ − y)
    assert step.gradients["0.W_dec"].tolist() == [[1.0, 1.0]]
    assert step.gradients["1.W_dec"].tolist() == [[2.0]]
    assert float(step.gradients["0.W_enc"]) == pytest.approx(5.0)  # (1·2 + 1·3)·x
    assert float(step.gradients["1.W_enc"]) == pytest.approx(10.0)  # 1·5·2
    assert (step.active, step.fired.tolist()) == (2, [True, True])


def test_the_penalty_of_a_crosscoder_adds_norms_of_sites():
    """Rows (3, 4) and (0, 2): norms 5 and 2 of two sites of width 2, not √29."""
    w = {"W_enc": torch.ones(1, 4), "b_enc": torch.zeros(1), "b_dec": torch.zeros(4)}
    w["W_dec"] = torch.tensor([[3.0, 4.0, 0.0, 2.0]])
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    step = ReLU(0.1, 0.0, sites=2).step(w, x, Context(torch.zeros(1).bool(), 0.0))
    assert float(step.auxiliary) == pytest.approx(0.1 * 2 * 7)


@pytest.mark.parametrize("name", ["cross-layer relu, skip", "cross-layer jumprelu", "cross-layer topk, skip"])
def test_finished_members_reconstruct_as_in_training(name: str):
    """Folding norms changes nothing, and every output's bias is with one member alone."""
    from circuitflow.dictionaries.reconstruction import reconstruct

    case = CASES[name]
    w, (x, y) = case.weights(), case.batch()
    codes, error = next(reconstruct(case.objective, w, x, y))
    features, reconstruction, _ = case.dense(w, x, y, context(case))
    torch.testing.assert_close(error.square().sum() / N, reconstruction, rtol=1e-10, atol=0)
    assert sum(one.nnz for one in codes) == int((features != 0).sum())
    biases = [done.weights["b_dec"] for done in case.objective.finish_members(w)]
    assert torch.equal(biases[0][:D], w["b_dec"][:D])
    assert not biases[0][D:].any()

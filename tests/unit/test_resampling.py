"""Dead features come back along inputs that are reconstructed badly, and everything else stays as it is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuitflow.dictionaries.objective import Finished
from circuitflow.dictionaries.resampling import ENCODER_SHARE, Resampling, revive

DEAD = [2, 5]


@dataclass(frozen=True)
class Thresholded:
    """A kind with a threshold of its own for every feature, of first value 0.25."""

    select: str = "threshold"
    unit_decoder: bool = True

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        return {"threshold": torch.full((d_dict,), 0.25)}

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        return {"mean": torch.zeros(())}

    def finish(self, weights: Any) -> Finished:
        return Finished(dict(weights), {}, {"threshold": weights["threshold"]})

    def step(self, weights: Any, x: Tensor, context: Any) -> Any:
        raise NotImplementedError


def make(d_dict: int = 6, d_model: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """Weights that reconstruct every input but rows 3 and 7 exactly, and a batch."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "W_enc": torch.eye(d_dict, d_model) * 3,
        "b_enc": torch.full((d_dict,), 0.5),
        "W_dec": torch.eye(d_dict, d_model),
        "b_dec": torch.arange(d_model) / 10,
        "threshold": torch.full((d_dict,), 1e9),
        "mean": torch.tensor(4.0),
    }
    x = weights["b_dec"].repeat(8, 1)  # nothing passes the thresholds, so that x̂ = b_dec
    x[[3, 7]] += torch.randn(2, d_model, generator=generator)
    return weights, x


def dead_mask(features: list[int], d_dict: int = 6) -> Tensor:
    return torch.isin(torch.arange(d_dict), torch.tensor(features, dtype=torch.int64))


def generator(step: int = 10) -> np.random.Generator:
    return Resampling(10, 0.5, seed=3).generator(step)


def test_hand_worked():
    weights, x = make()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    revived = revive(Thresholded(), weights, x, dead_mask(DEAD), generator())
    assert revived.tolist() == DEAD
    centred = x[[3, 7]] - weights["b_dec"]
    units = centred / centred.norm(dim=1, keepdim=True)
    drawn = weights["W_dec"][DEAD]
    torch.testing.assert_close(drawn[drawn[:, 0].argsort()], units[units[:, 0].argsort()])
    living = before["W_enc"][[0, 1, 3, 4]].norm(dim=1).mean()
    torch.testing.assert_close(weights["W_enc"][DEAD], ENCODER_SHARE * living * drawn)
    assert weights["b_enc"][DEAD].tolist() == [0, 0]
    assert weights["threshold"][DEAD].tolist() == [0.25, 0.25]
    for name, tensor in weights.items():
        kept = ~dead_mask(DEAD) if tensor.ndim and tensor.shape[0] == 6 else ...
        assert torch.equal(tensor[kept], before[name][kept]), name


def test_nothing_dead_changes_nothing():
    weights, x = make()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    assert revive(Thresholded(), weights, x, dead_mask([]), generator()).tolist() == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


def test_all_dead_takes_the_norm_of_all():
    weights, x = make()
    x += torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    mean = weights["W_enc"].norm(dim=1).mean()
    revived = revive(Thresholded(), weights, x, dead_mask(list(range(6))), generator())
    assert revived.tolist() == list(range(6))
    torch.testing.assert_close(weights["W_enc"].norm(dim=1), torch.full((6,), float(ENCODER_SHARE * mean)))
    gram = (weights["W_dec"] @ weights["W_dec"].T).fill_diagonal_(0)
    assert gram.max() < 0.9999  # no input twice


def test_more_dead_than_inputs_with_an_error():
    weights, x = make()
    assert revive(Thresholded(), weights, x, dead_mask([0, 2, 5]), generator()).tolist() == [0, 2]
    weights, x = make()
    exact = weights["b_dec"].repeat(3, 1)
    assert revive(Thresholded(), weights, exact, dead_mask(DEAD), generator()).tolist() == []


def test_inputs_are_drawn_in_proportion_to_their_squared_error():
    weights, _ = make()
    lengths = torch.tensor([1.0, 2.0, 3.0])
    x = weights["b_dec"] + torch.diag(lengths) @ torch.eye(3, 4)
    found = np.zeros(3)
    for step in range(600):
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        revive(Thresholded(), changed, x, dead_mask([5]), generator(step))
        found[int(changed["W_dec"][5].argmax())] += 1
    expected = 600 * np.array([1, 4, 9]) / 14
    assert (np.abs(found - expected) < 4 * np.sqrt(expected)).all(), found


def test_random_numbers_depend_on_seed_and_step_alone():
    first = generator(10).random(4)
    assert (generator(10).random(4) == first).all()
    assert (generator(20).random(4) != first).all()
    assert (Resampling(10, 0.5, seed=4).generator(10).random(4) != first).all()


@pytest.mark.parametrize(("done", "due"), [(9, False), (10, True), (50, True), (51, False), (60, False)])
def test_when_it_is_due(done: int, due: bool):
    assert Resampling(10, 0.5, seed=0).due(done, steps=100) is due

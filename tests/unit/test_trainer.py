"""The trainer: schedules, what it does to gradients, what it tracks, and that its state is all there is."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitflow.dictionaries.kinds import TRAINED, Request
from circuitflow.dictionaries.objective import Context, Finished, Objective, Step
from circuitflow.dictionaries.resampling import Resampling
from circuitflow.dictionaries.settings import Settings
from circuitflow.dictionaries.tensors import read_tensors, write_tensors
from circuitflow.dictionaries.trainer import NonFiniteError, Schedule, Trainer, first_weights
from tests.fixtures.activation_store import planted
from tests.fixtures.training_process import params

D_MODEL, D_DICT, BATCH, STEPS = 16, 40, 48, 40
SILENT = 6  # features that never fire unless they are resampled


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def objective_of(kind: str, **training: Any) -> Objective:
    settings = Settings.of(params(kind, d_dict=D_DICT, k=3, **training)["settings"])
    return TRAINED[kind](Request("resid.1", D_MODEL, settings))


def trainer_of(objective: Objective, seed: int = 0, **options: Any) -> Trainer:
    schedule = options.pop("schedule", Schedule(3e-3, STEPS, 0.1, 0.2, sparsity_warmup=0.5))
    weights = first_weights(objective, D_MODEL, D_DICT, seed)
    weights["b_enc"][:SILENT] = -9.0
    return Trainer(objective, weights, schedule, options.pop("dead_after", 150), **options)


def batches() -> list[Tensor]:
    x = torch.from_numpy(planted(STEPS * BATCH, D_MODEL, 24, 3, seed=0)[0])
    x = x - x.mean(dim=0)
    return list((x / x.square().sum(dim=1).mean().sqrt()).split(BATCH))


def bits(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


@dataclass(frozen=True)
class Scripted:
    """An objective with given gradients: 1 for every weight unless said otherwise."""

    unit_decoder: bool = True
    reconstruction: float = 1.0
    gradient: float = 1.0
    select: str = "topk"
    seen: list[Context] = field(default_factory=list)

    def extra_weights(self, d_dict: int) -> dict[str, Tensor]:
        return {"gate": torch.zeros(d_dict)}

    def tracked(self, d_dict: int) -> dict[str, Tensor]:
        return {"count": torch.zeros(())}

    def step(self, weights: Any, x: Tensor, context: Context) -> Step:
        self.seen.append(context)
        gradients = {
            name: torch.full_like(t, self.gradient) for name, t in weights.items() if name != "count"
        }
        fired = torch.arange(D_DICT) < 10
        loss = x.new_tensor(self.reconstruction)
        return Step(gradients, fired, loss, loss.new_zeros(()), 1, {"count": weights["count"] + 1})

    def finish(self, weights: Any) -> Finished:
        return Finished(dict(weights), {"k": 1}, {})


def test_sparsity_rises_over_its_share_of_the_steps():
    objective = Scripted()
    trainer = trainer_of(objective)
    for x in batches():
        trainer.step(x)
    rising = [context.sparsity for context in objective.seen]
    assert rising == pytest.approx([min(1.0, done / 20) for done in range(STEPS)])
    assert [context.done for context in objective.seen] == pytest.approx([n / STEPS for n in range(STEPS)])
    assert Schedule(1.0, 10, 0.0, 0.0).sparsity(0) == 1.0


def test_tracked_tensors_are_stored_and_no_optimizer_sees_them():
    trainer = trainer_of(Scripted())
    for x in batches()[:3]:
        trainer.step(x)
    assert float(trainer.weights["count"]) == 3
    assert "exp_avg.count" not in trainer.state()
    assert "exp_avg.gate" in trainer.state()


@pytest.mark.parametrize("unit", [True, False])
def test_decoder_rows_keep_norm_one_only_where_wanted(unit: bool):
    trainer = trainer_of(Scripted(unit_decoder=unit))
    before = trainer.weights["W_dec"].clone()
    trainer.step(batches()[0])
    norms = trainer.weights["W_dec"].norm(dim=1)
    assert torch.allclose(norms, torch.ones(D_DICT)) is unit
    moment = trainer.state()["exp_avg.W_dec"]
    along = (moment * before).sum(dim=1)
    assert torch.allclose(along, torch.zeros(D_DICT), atol=1e-6) is unit


def test_gradients_are_clipped_to_a_norm_of_all_weights_together():
    objective = Scripted(unit_decoder=False)
    plain, clipped, loose = (trainer_of(objective, clip_norm=clip) for clip in (None, 0.5, 1e6))
    for trainer in (plain, clipped, loose):
        trainer.step(batches()[0])
    size = 2 * D_DICT * D_MODEL + 2 * D_DICT + D_MODEL
    assert plain.gradient_norm == clipped.gradient_norm == pytest.approx(size**0.5)
    moments = [value for name, value in clipped.state().items() if name.startswith("exp_avg.")]
    assert float(torch.cat([m.flatten() for m in moments]).norm()) == pytest.approx(0.1 * 0.5)  # 1 − β₁
    assert bits(plain.state()) == bits(loose.state())


@pytest.mark.parametrize(
    ("objective", "what"),
    [(Scripted(reconstruction=float("nan")), "loss"), (Scripted(gradient=float("inf")), "gradient")],
)
def test_a_step_that_is_not_finite_changes_nothing(objective: Scripted, what: str):
    trainer = trainer_of(objective)
    before = bits(trainer.state())
    with pytest.raises(NonFiniteError, match=what):
        trainer.step(batches()[0])
    assert (bits(trainer.state()), trainer.done) == (before, 0)


def test_features_die_after_a_number_of_tokens_and_come_back_when_resampled():
    objective = objective_of("topk", auxk_weight=0.0)
    dying = trainer_of(objective)
    reviving = trainer_of(objective, resampling=Resampling(10, 0.5, seed=0))
    shares = []
    for x in batches()[:25]:
        dying.step(x)
        dead = reviving.idle > 150 - BATCH  # but for those that fire in this very batch
        reviving.step(x)
        shares.append((dying.dead_share, reviving.dead_share))
        if reviving.done == 10:
            rows = dead & ~reviving.dead & (reviving.weights["b_enc"] == 0)
            assert reviving.resampled == int(rows.sum()) >= SILENT
            for moment in ("exp_avg", "exp_avg_sq"):
                for name in ("W_enc", "b_enc", "W_dec"):
                    values = reviving.state()[f"{moment}.{name}"]
                    assert not values[rows].any()
                    assert values[~rows].any()
                assert reviving.state()[f"{moment}.b_dec"].all()
    assert shares[8][0] == shares[8][1] > 0
    assert shares[9][1] == 0 < shares[9][0]


@pytest.mark.parametrize("kind", TRAINED)
def test_low_precision_is_near_and_keeps_everything_in_float32(kind: str):
    objective = objective_of(kind)
    trainers = [trainer_of(objective, precision=precision) for precision in ("float32", "bfloat16")]
    losses = [[float(trainer.step(x).reconstruction) for x in batches()] for trainer in trainers]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.1)
    assert losses[0] != losses[1]
    assert {tensor.dtype for tensor in trainers[1].state().values() if tensor.is_floating_point()} == {
        torch.float32
    }


OPTIONS: dict[str, Any] = {"clip_norm": 0.5, "dead_after": 100, "resampling": Resampling(9, 0.8, seed=4)}


def run(trainer: Trainer, until: int) -> list[tuple[float, float, int, float]]:
    told = []
    every = batches()
    while trainer.done < until:
        step = trainer.step(every[trainer.done])
        told.append((float(step.reconstruction), float(step.auxiliary), step.active, trainer.gradient_norm))
    return told


@pytest.mark.parametrize("at", [0, 13, 27])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_resumed_run_is_the_same_to_the_last_bit(kind: str, at: int, tmp_path: Path):
    objective = objective_of(kind)
    whole = trainer_of(objective, **OPTIONS)
    first = bits(whole.state())
    told = run(whole, STEPS)
    assert whole.resampled > 0
    assert all(
        data != first[name] for name, data in bits(whole.state()).items() if name.startswith("weights.")
    )

    stopped = trainer_of(objective, **OPTIONS)
    run(stopped, at)
    write_tensors(tmp_path / "state.safetensors", stopped.state(), {})
    resumed = trainer_of(objective, seed=1, **OPTIONS)  # nothing of its own may remain
    resumed.restore(read_tensors(tmp_path / "state.safetensors")[0], at)
    assert run(resumed, STEPS) == told[at:]
    assert bits(resumed.state()) == bits(whole.state())


@pytest.mark.parametrize("kind", TRAINED)
def test_no_part_of_the_state_can_be_left_out(kind: str):
    """Each tensor of the state, put back to its first value, changes what follows."""
    objective = objective_of(kind)
    first = {name: tensor.clone() for name, tensor in trainer_of(objective, **OPTIONS).state().items()}
    stopped = trainer_of(objective, **OPTIONS)
    run(stopped, 12)
    stopped.weights["b_enc"][:SILENT] = -9.0  # so that the next resampling has something to do
    run(stopped, 17)
    state = {name: tensor.clone() for name, tensor in stopped.state().items()}
    run(stopped, 21)
    expected = bits(stopped.state())
    for name in state:
        resumed = trainer_of(objective, **OPTIONS)
        resumed.restore({**state, name: first[name]}, 17)
        with suppress(NonFiniteError):  # as Adam's second moments at 0
            run(resumed, 21)
        assert bits(resumed.state()) != expected, name


def test_share_of_steps_and_sparsity_come_from_the_number_of_steps_alone():
    objective = Scripted()
    trainer = trainer_of(objective)
    trainer.restore(trainer.state(), 10)
    trainer.step(batches()[0])
    assert (objective.seen[-1].done, objective.seen[-1].sparsity) == (0.25, 0.5)

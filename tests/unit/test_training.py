"""Training: what it learns, what it writes, and that a killed run resumed equals one never killed."""

import errno
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from circuitflow.dictionaries.describing import read_log
from circuitflow.dictionaries.dictionary import load_dictionary
from circuitflow.dictionaries.feeding import Feed
from circuitflow.dictionaries.kinds import TRAINED
from circuitflow.dictionaries.rows import open_rows
from circuitflow.dictionaries.settings import Training
from circuitflow.dictionaries.state import STATE_FILE, TrainingLog
from circuitflow.dictionaries.tensors import read_tensors, write_tensors
from circuitflow.dictionaries.trainer import Schedule, Trainer
from circuitflow.errors import UserError
from circuitflow.store.shuffle import ShuffledRows
from tests.fixtures.activation_store import SITE, planted, with_sinks, write_store
from tests.fixtures.training_process import TRAINING, params, start, steps_done, train

KEYS = [
    "auxiliary", "dead", "fvu", "grad_norm", "held_out", "l0", "loss", "lr", "resampled", "sparsity", "step", "tokens"
]  # fmt: skip
LONG = {"epochs": 30.0, "checkpoints": [0.1, 0.5]}  # about 900 steps of a millisecond
N = 2048


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = with_sinks(planted(N, 16, 24, 3, seed=0)[0])
    return write_store(tmp_path_factory.mktemp("store"), "activations", {SITE: x}, [3, 50, 99])


@pytest.fixture(scope="module")
def finished(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a long run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(manifest, folder, params(**LONG))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_torn_files(found: dict[str, bytes]) -> dict[str, bytes]:
    """A kill in the middle of a write leaves its temporary name behind."""
    return {name: data for name, data in found.items() if not name.endswith(".tmp")}


def test_recovers_a_planted_orthogonal_dictionary(tmp_path: Path):
    x, rows = planted(3200, 24, 24, 2, seed=1, orthogonal=True)
    manifest = write_store(tmp_path, "activations", {SITE: with_sinks(x)}, [3, 50])
    wanted = params(d_dict=48, k=3, epochs=30.0, dead_after=3000)
    train(manifest, tmp_path / "run", wanted)
    learned = load_dictionary(tmp_path / "run" / "weights.safetensors")
    best = (torch.from_numpy(rows) @ learned.W_dec.T).max(dim=1).values
    assert float(best.mean()) > 0.95
    last = read_log(tmp_path / "run" / "log.jsonl")[-1]
    assert last["held_out"]["fvu"] < 0.1


def test_weights_are_in_raw_units_with_unit_decoder_rows(manifest: Path, finished: Path):
    dictionary = load_dictionary(finished / "weights.safetensors", width=16)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(32))
    x = torch.from_numpy(with_sinks(planted(N, 16, 24, 3, seed=0)[0])[48:64])  # a held-out block
    codes = dictionary.encode(x, torch.arange(16))
    assert codes.counts().tolist()[0] == 0
    fvu = float(dictionary.error(x, codes)[1:].square().sum() / (x[1:] - x[1:].mean(0)).square().sum())
    logged = read_log(finished / "log.jsonl")[-1]["held_out"]["fvu"]
    assert fvu == pytest.approx(logged, rel=0.5)
    assert fvu < 0.2
    assert dictionary.skip.positions == (0,)
    assert 10 < dictionary.skip.max_norm < 30  # 5 × the median norm; sinks have 500
    assert dictionary.notes["share_left_out_by_norm"] == pytest.approx(1 / (N - 48))


def test_log_has_fixed_keys_and_no_times(finished: Path):
    lines = read_log(finished / "log.jsonl")
    assert all(sorted(line) == KEYS for line in lines)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    measured = [line for line in lines if line["held_out"] is not None]
    assert [line["step"] for line in measured[:-1]] == list(range(20, lines[-1]["step"], 20))
    assert sorted(measured[0]["held_out"]) == ["fvu", "l0", "silent"]
    assert measured[-1]["step"] == lines[-1]["step"]
    assert measured[-1]["held_out"]["fvu"] < measured[0]["held_out"]["fvu"]
    assert lines[0]["lr"] < max(line["lr"] for line in lines) == pytest.approx(3e-3)
    kept = N - 48 - 125 - 1
    assert lines[-1]["tokens"] == 30 * kept  # whole epochs, every kept row once in each


def test_checkpoints_are_dictionaries_of_their_step(finished: Path):
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    last = read_log(finished / "log.jsonl")[-1]["step"]
    assert names == sorted(f"step_{round(share * last)}.safetensors" for share in (0.1, 0.5))
    for name in names:
        assert load_dictionary(finished / "checkpoints" / name).notes["step"] == int(name[5:-12])


def kill_and_resume(manifest: Path, folder: Path, wanted: dict[str, Any], kills: int, seed: int) -> None:
    """Run until a state is written, kill, run again …, and at last to the end."""
    moments, resumed_at = random.Random(seed), []
    for _ in range(kills):
        before = steps_done(folder)
        process = start(manifest, folder, wanted, interval=0.05)
        while steps_done(folder) <= before and process.is_alive():
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed: make it longer"
        resumed_at.append(steps_done(folder))
    assert resumed_at == sorted(set(resumed_at))
    assert resumed_at[0] > 0
    process = start(manifest, folder, wanted, interval=0.05)
    process.join()
    assert process.exitcode == 0


def test_a_run_killed_at_random_moments_equals_one_never_killed(manifest, finished, tmp_path):
    kill_and_resume(manifest, tmp_path / "killed", params(**LONG), kills=4, seed=5)
    assert without_torn_files(files(tmp_path / "killed")) == files(finished)


@pytest.mark.parametrize("kind", sorted({"batchtopk", "jumprelu"} & set(TRAINED)))
def test_killed_with_thresholds_and_resampling(manifest, tmp_path, kind):
    changes = {"dead_after": 40, "resample_every": 25, "resample_until": 0.7, "clip_norm": 0.5}
    wanted = params(kind, d_dict=64, **{**LONG, **changes, "epochs": 12.0})
    train(manifest, tmp_path / "whole", wanted)
    assert read_log(tmp_path / "whole" / "log.jsonl")[-1]["resampled"] > 0
    kill_and_resume(manifest, tmp_path / "killed", wanted, kills=1, seed=6)
    assert without_torn_files(files(tmp_path / "killed")) == files(tmp_path / "whole")


def test_sigterm_saves_the_state_and_ends_at_once(manifest, finished, tmp_path, capfd):
    folder = tmp_path / "terminated"
    process = start(manifest, folder, params(**LONG), interval=1e6)
    while not (folder / "log.jsonl").is_file() or not (folder / "log.jsonl").stat().st_size:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    asked = time.monotonic()
    process.join()
    assert process.exitcode == 143
    assert time.monotonic() - asked < 5
    assert steps_done(folder) > 0
    train(manifest, folder, params(**LONG))
    assert files(folder) == files(finished)


def test_a_finished_run_is_not_repeated(manifest, tmp_path):
    wanted = params(epochs=1.0)
    first = train(manifest, tmp_path / "run", wanted)
    before = (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns
    again = train(manifest, tmp_path / "run", wanted)
    assert (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns == before
    assert (again.content, again.details) == (first.content, first.details)
    assert first.details["last"]["step"] == read_log(tmp_path / "run" / "log.jsonl")[-1]["step"]


WINDOWED = {"buffer_rows": 512}  # a quarter of the rows: the data cursor lies inside a window


def interrupted(manifest: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, code: str = "1") -> int:
    """Stop a run in the middle, with its state saved; returns the steps done."""
    from circuitflow.dictionaries import training

    class Stop(training.Interval):
        def due(self) -> bool:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 31:
                raise KeyboardInterrupt
            return self.calls == 30

    with monkeypatch.context() as patch:
        patch.setattr(training, "Interval", Stop)
        with pytest.raises(KeyboardInterrupt):
            train(manifest, folder, params(**WINDOWED), code=code)
    return steps_done(folder)


def test_a_resumed_run_takes_only_the_steps_that_are_left(manifest, tmp_path, monkeypatch):
    assert interrupted(manifest, tmp_path / "run", monkeypatch) == 30
    taken, step = [], Trainer.step

    def counted(self, x):
        taken.append(self.done)
        return step(self, x)

    monkeypatch.setattr(Trainer, "step", counted)
    train(manifest, tmp_path / "run", params(**WINDOWED))
    assert taken[0] == 30
    train(manifest, tmp_path / "whole", params(**WINDOWED))
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.parametrize("trouble", ["other recipe", "torn state", "short log"])
def test_a_state_that_does_not_fit_is_never_used(manifest, tmp_path, monkeypatch, trouble):
    folder = tmp_path / "run"
    interrupted(manifest, folder, monkeypatch, code="2" if trouble == "other recipe" else "1")
    if trouble == "torn state":
        (folder / STATE_FILE).write_bytes((folder / STATE_FILE).read_bytes()[:200])
    if trouble == "short log":
        os.truncate(folder / "log.jsonl", 10)
    train(manifest, folder, params(**WINDOWED))
    train(manifest, tmp_path / "whole", params(**WINDOWED))
    assert files(folder) == files(tmp_path / "whole")


def test_another_seed_gives_other_weights(manifest, tmp_path):
    runs = [train(manifest, tmp_path / str(seed), params(epochs=0.5, seed=seed)) for seed in (0, 1)]
    assert runs[0].content != runs[1].content


class TestNotFinite:
    """A loss or gradient that stops being finite."""

    WILD: ClassVar[dict[str, Any]] = {"learning_rate": 1e30, "warmup": 0.0, "auxk_weight": 0.0}

    def diverge(self, manifest: Path, folder: Path, **training: Any) -> str:
        with np.errstate(all="ignore"), pytest.raises(UserError) as failed:
            train(manifest, folder, params(**{**self.WILD, **training}))
        return str(failed.value)

    def test_ends_with_one_sentence_and_the_last_good_state(self, manifest, tmp_path):
        sentence = self.diverge(manifest, tmp_path)
        path = tmp_path / STATE_FILE
        assert re.fullmatch(
            r"The loss at resid\.1 stopped being finite at step 2 of \d+; lower dictionaries\.training\.learning_rate, "
            rf"or set clip_norm \(the last good state is kept in {path}\)\.",
            sentence,
        )
        state = read_tensors(path)[0]
        assert all(tensor.isfinite().all() for name, tensor in state.items() if name.startswith("weights."))
        assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1]
        assert not (tmp_path / "weights.safetensors").exists()

    def test_a_gradient_is_named(self, manifest, tmp_path, monkeypatch):
        from circuitflow.dictionaries.topk import TopK

        step = TopK.step

        def spoiled(self, weights, x, context):
            result = step(self, weights, x, context)
            if context.done > 0.1:
                result.gradients["b_dec"][0] = float("inf")
            return result

        monkeypatch.setattr(TopK, "step", spoiled)
        with pytest.raises(UserError, match=r"^The gradient at resid\.1 stopped being finite at step"):
            train(manifest, tmp_path, params())
        assert torch.isfinite(read_tensors(tmp_path / STATE_FILE)[0]["weights.b_dec"]).all()

    def test_the_same_settings_say_so_again_without_a_step(self, manifest, tmp_path, monkeypatch):
        sentence = self.diverge(manifest, tmp_path)
        kept = files(tmp_path)
        updates = []
        monkeypatch.setattr(Trainer, "_update", lambda self, gradients: updates.append(self.done))
        assert self.diverge(manifest, tmp_path) == sentence
        assert updates == []
        assert files(tmp_path) == kept

    def test_a_lower_learning_rate_starts_afresh(self, manifest, tmp_path, caplog):
        self.diverge(manifest, tmp_path / "run")
        train(manifest, tmp_path / "run", params())
        assert "belongs to other settings" in caplog.text
        train(manifest, tmp_path / "whole", params())
        assert files(tmp_path / "run") == files(tmp_path / "whole")

    @pytest.mark.parametrize(
        ("name", "place", "sentence"),
        [
            ("b_dec", (0,), r"The loss at .* at step 36 of"),
            ("W_enc", (0, 0), r"The weights at .* stopped"),  # TopK never selects it again: no loss shows it
        ],
    )
    def test_weights_that_are_not_finite_never_replace_a_state(
        self, manifest, tmp_path, monkeypatch, name, place, sentence
    ):
        step = Trainer.step

        def spoiled(self, x):
            if self.done == 35:
                self.weights[name][place] = float("nan")
            return step(self, x)

        interrupted(manifest, tmp_path, monkeypatch)
        monkeypatch.setattr(Trainer, "step", spoiled)
        with pytest.raises(UserError, match=sentence):
            train(manifest, tmp_path, params(**WINDOWED))
        assert steps_done(tmp_path) == 30
        assert not (tmp_path / "weights.safetensors").exists()


def test_reading_ahead_gives_the_same_batches(manifest):
    rows = open_rows(manifest, SITE)
    stores = [ShuffledRows(rows.store, [SITE], 100, 512, seed=3) for _ in range(2)]
    plain, ahead = (
        Feed(store, SITE, torch.device("cpu"), 50, ahead=early)
        for store, early in zip(stores, (False, True), strict=True)
    )
    for number in [*range(20), *range(30, 50)]:  # a resumed run begins anywhere
        assert torch.equal(plain.at(number), ahead.at(number))
    ahead.close()
    plain.close()


@pytest.mark.parametrize("kind", ["random", "identity"])
def test_made_kinds_need_no_training(manifest, tmp_path, kind):
    out = train(manifest, tmp_path / "run", params(kind=kind))
    assert sorted(files(tmp_path / "run")) == ["log.jsonl", "weights.safetensors"]
    assert read_log(tmp_path / "run" / "log.jsonl") == []
    assert (out.details["kind"], out.details["last"]) == (kind, None)
    assert load_dictionary(tmp_path / "run" / "weights.safetensors").d_dict == (
        16 if kind == "identity" else 32
    )


def test_settings_name_unknown_keys():
    with pytest.raises(UserError, match=r"training\.epoch is unknown; did you mean 'epochs'"):
        Training.of({"epoch": 3})
    chosen = Training.of({**TRAINING, "checkpoints": [0.0, 0.26, 1.0]}).checkpoint_steps(50)
    assert chosen == {1, 13}


def test_schedule_rises_holds_and_falls():
    schedule = Schedule(1.0, steps=100, warmup=0.1, decay=0.2)
    rates = [schedule.at(done) for done in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert set(rates[9:81]) == {1.0}
    assert rates[-3:] == pytest.approx([0.15, 0.1, 0.05])
    assert Schedule(1.0, steps=1, warmup=0.0, decay=0.0).at(0) == 1.0


def test_interval_that_is_not_a_number(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("CIRCUITFLOW_CHECKPOINT_SECONDS", "soon")
    with pytest.raises(UserError, match="is 'soon', not a number"):
        train(manifest, tmp_path / "run", params())


def test_no_space_left_is_the_systems_error_and_leaves_the_old_file(tmp_path):
    import resource

    path = tmp_path / "state.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, {"done": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as failed:
            write_tensors(path, {"a": torch.ones(100_000)}, {"done": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert failed.value.errno == errno.EFBIG
    assert read_tensors(path)[1] == {"done": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_log_is_cut_to_the_length_of_the_state(tmp_path):
    with TrainingLog(tmp_path / "log.jsonl") as log:
        log.write({"step": 1})
        length = log.sync()
        log.write({"step": 2})
    with TrainingLog(tmp_path / "log.jsonl", length) as log:
        log.write({"step": 3})
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 3]

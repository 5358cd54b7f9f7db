"""Followers of a log: every line once, whatever breaks; Weights & Biases for real, offline."""

import json
import logging
import os
import runpy
import shutil
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from circuitflow import code_digests, tracking
from circuitflow.dictionaries.describing import read_log
from circuitflow.dictionaries.state import Interval
from circuitflow.tracking import Run, follow, tracking_of
from tests.fixtures.activation_store import SITE, planted, with_sinks, write_store
from tests.fixtures.training_process import params, start, steps_done, train

SCRIPT = code_digests.PACKAGE.parent / "workflow_scripts" / "train_dictionary.py"
RUN = Run("0123abcd", "resid.1", {"kind": "topk"})


class Recorder:
    """A sink that keeps what it gets, and breaks at a step."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.taken: list[tuple[int, dict[str, float]]] = []
        self.closed: list[bool] = []
        self._breaks_at = breaks_at

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.taken.append((step, dict(values)))
        if step == self._breaks_at:
            raise ConnectionError("the line\nwent dead")

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = with_sinks(planted(1024, 16, 24, 3, seed=0)[0])
    return write_store(tmp_path_factory.mktemp("store"), "activations", {SITE: x}, [3, 50])


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(tracking, "SINKS", {"wandb": lambda chosen, run: recorder})
    return recorder


def lines(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "fvu": 1 / step, "held_out": None} for step in steps]


def chosen(folder: Path) -> dict[str, Any]:
    return {"wandb": {"project": "p"}, "folder": str(folder / "logs")}


def test_lines_reach_the_sink_flat_and_in_order(sink: Recorder, tmp_path: Path):
    with follow(chosen(tmp_path), RUN, lines(1)) as track:
        track({"step": 2, "fvu": 0.5, "held_out": {"fvu": 0.25, "l0": 3.0}})
    assert sink.taken == [(1, {"fvu": 1.0}), (2, {"fvu": 0.5, "held_out/fvu": 0.25, "held_out/l0": 3.0})]
    assert sink.closed == [False]


def test_nothing_configured_follows_nothing(sink: Recorder, tmp_path: Path):
    for nothing in (None, {}, {"wandb": None, "folder": str(tmp_path)}):
        with follow(nothing, RUN, lines(1)) as track:
            track(lines(2)[0])
    assert sink.taken == []
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_job_goes_on_where_the_view_ended(sink: Recorder, tmp_path: Path):
    def terminated() -> None:
        with follow(chosen(tmp_path), RUN, []) as track:
            for line in lines(1, 2, 3):
                track(line)
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        terminated()
    assert sink.closed == [True]
    with follow(chosen(tmp_path), RUN, lines(1)) as track:  # the state was that after step 1
        for line in lines(2, 3, 4):
            track(line)
    assert [step for step, _ in sink.taken] == [1, 2, 3, 4]
    with follow(chosen(tmp_path), Run("another", "resid.1", {}), lines(1)):
        pass
    assert [step for step, _ in sink.taken] == [1, 2, 3, 4, 1]


def test_lines_written_before_tracking_was_turned_on_are_caught_up(sink: Recorder, tmp_path: Path):
    with follow(None, RUN, []) as track:
        track(lines(1)[0])
    with follow(chosen(tmp_path), RUN, lines(1, 2)) as track:
        track(lines(3)[0])
    assert [step for step, _ in sink.taken] == [1, 2, 3]


def test_a_sink_that_breaks_is_one_warning(monkeypatch, caplog, tmp_path: Path):
    recorder = Recorder(breaks_at=2)
    monkeypatch.setattr(tracking, "SINKS", {"wandb": lambda chosen, run: recorder})
    with follow(chosen(tmp_path), RUN, []) as track:
        for line in lines(1, 2, 3, 4):
            track(line)
    assert [step for step, _ in recorder.taken] == [1, 2]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "tracking.wandb: the line went dead; the training goes on without it" in caplog.text


def test_a_missing_package_is_one_warning(monkeypatch, caplog, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with follow(chosen(tmp_path), RUN, lines(1)) as track:
        track(lines(2)[0])
    assert len(caplog.records) == 1
    assert "wandb is not installed (pip install 'circuitflow[tracking]')" in caplog.text


def test_what_a_workflow_says(tmp_path: Path):
    job = SimpleNamespace(
        config={"tracking": {"wandb": {"project": "p"}}},
        output=["results/gpt2/dictionaries/study/topk-k32/resid.6.json"],
        log=["logs/gpt2/train_dictionary.study/topk-k32.resid.6.log"],
    )
    assert tracking_of(job) == {
        "wandb": {"project": "p"},
        "folder": "logs/gpt2/train_dictionary.study/topk-k32.resid.6.tracking",
        "name": "gpt2/dictionaries/study/topk-k32/resid.6",
    }
    for nothing in ({}, {"tracking": None}, {"tracking": {"wandb": None}}):
        assert tracking_of(SimpleNamespace(**{**vars(job), "config": nothing})) is None


def test_an_edit_to_tracking_trains_nothing_again():
    closure = code_digests.CodeReader().closure(SCRIPT)
    assert code_digests.PACKAGE / "tracking.py" in closure
    assert "circuitflow/tracking.py" in code_digests.NEUTRAL_LABELS


class Items(dict):
    """What Snakemake hands to scripts: named values that iterate over the values."""

    def __iter__(self) -> Any:
        return iter(self.values())


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Threads and determinism as they were."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("torch_settings")
def test_the_rule_hands_it_over_and_its_fingerprint_does_not_know(sink, manifest, tmp_path, monkeypatch):
    made = []
    for number, config in enumerate(({}, {"tracking": {"wandb": {"project": "p"}}})):
        root = tmp_path / str(number)
        (root / "results" / "m").mkdir(parents=True)
        shutil.copytree(manifest.parents[1], root / "results" / "m", dirs_exist_ok=True)
        monkeypatch.chdir(root)
        job = SimpleNamespace(
            rule="train_dictionary",
            input=Items(activations="results/m/activations/manifest.json"),
            output=Items(manifest="results/m/dictionaries/main/resid.1.json"),
            params=Items(**params(), code="c0de"),
            wildcards=Items(set="main", site=SITE),
            log=["logs/m/train_dictionary.main.resid.1.log"],
            config=config,
        )
        runpy.run_path(str(SCRIPT), init_globals={"snakemake": job})
        made.append(Path("results/m/dictionaries/main/resid.1.json").read_bytes())
        assert bool(sink.taken) is bool(config)
    assert made[0] == made[1]
    assert [path.name for path in Path("logs/m/train_dictionary.main.resid.1.tracking").iterdir()] != []


# ---- the real package -------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    package = pytest.importorskip("wandb")
    yield package
    package.teardown()


def records(path: Path) -> Iterator[Any]:
    """Records of a run's file: blocks of 32 KiB with parts of (checksum, length, kind), 1 = whole, 4 = last."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def logged(folder: Path) -> tuple[list[dict[str, float]], set[str]]:
    """What all runs kept under a folder have logged, in order, and their ids."""
    history, ids = [], set()
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
            if kind == "history":
                items = record.history.item
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items
                }
                history.append(values)
    return history, ids


def tracked(folder: Path, **training: Any) -> dict[str, Any]:
    return {
        **params(**training),
        "tracking": {"wandb": {"project": "p", "group": "g"}, "folder": str(folder)},
    }


class Stop(Interval):
    """Saves the state after 20 steps and ends the run, without a word to anyone, after 30."""

    calls = 0

    def due(self) -> bool:
        type(self).calls += 1
        if self.calls == 30:
            raise KeyboardInterrupt
        return self.calls == 20


def test_offline_an_interrupted_training_is_one_run_with_every_step_once(
    wandb, manifest, tmp_path, monkeypatch
):
    from circuitflow.dictionaries import training

    train(manifest, tmp_path / "plain", params())
    run, folder = tmp_path / "run", tmp_path / "logs"
    with monkeypatch.context() as patch:
        patch.setattr(training, "Interval", Stop)
        with pytest.raises(KeyboardInterrupt):
            train(manifest, run, tracked(folder))
    assert steps_done(run) == 20
    time.sleep(1.1)  # the package names its folders by the second
    train(manifest, run, tracked(folder))
    history, ids = logged(folder)
    assert len(ids) == 1
    lines = read_log(run / "log.jsonl")
    assert [values["_step"] for values in history] == [line["step"] for line in lines]
    for values, line in zip(history, lines, strict=True):
        assert values["fvu"] == line["fvu"]
        assert values.get("held_out/fvu") == (line["held_out"] or {}).get("fvu")
    for path in (tmp_path / "plain").rglob("*.*"):
        assert (run / path.relative_to(tmp_path / "plain")).read_bytes() == path.read_bytes()
    assert not list(run.rglob("*wandb*"))


def test_a_killed_training_logs_no_step_twice(wandb, manifest, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "logs"
    wanted = tracked(folder, epochs=40.0)
    process = start(manifest, run, wanted, interval=0.1)
    while steps_done(run) == 0 and process.is_alive():
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    process.join()
    killed_at = steps_done(run)
    assert 0 < killed_at < 600
    time.sleep(1.1)
    train(manifest, run, wanted)
    history, ids = logged(folder)
    steps = [values["_step"] for values in history]
    assert len(ids) == 1
    assert steps == sorted(set(steps))
    assert steps[-1] == read_log(run / "log.jsonl")[-1]["step"]
    resumed = [step for step in steps if step > killed_at]
    assert len(resumed) > 10


def test_without_a_connection_the_run_is_kept_offline(wandb, manifest, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setitem(tracking.QUIET, "init_timeout", 1.0)
    wanted = tracked(tmp_path / "logs")
    wanted["tracking"]["wandb"]["mode"] = "online"
    caplog.set_level(logging.INFO, "circuitflow")
    train(manifest, tmp_path / "run", wanted)
    ours = [record for record in caplog.records if record.name == "circuitflow"]
    warnings = [record.getMessage() for record in ours if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "no connection" in warnings[0]
    assert f"kept in {tmp_path / 'logs'}/wandb; `wandb sync` uploads it" in caplog.text
    history, _ = logged(tmp_path / "logs")
    assert len(history) == len(read_log(tmp_path / "run" / "log.jsonl"))

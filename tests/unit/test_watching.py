"""The terminal view, rendered to text: what runs, curves of trainings, and that it fits into the terminal."""

import io
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from circuitflow import progress
from circuitflow.watching import View, read_lines, sparkline
from tests.fixtures.activation_store import SITE, planted, write_store
from tests.fixtures.training_process import params, train

WIDTH, HEIGHT = 100, 30


def job(logs: Path, name: str, **changes: Any) -> None:
    state = {
        "job": name,
        "what": "steps",
        "done": 600,
        "total": 1500,
        "elapsed": 75.0,
        "remaining": 130.0,
        "facts": {"fvu": "0.1234", "l0": "32", "dead": "0.01"},
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "curves": None,
    }
    file = logs / "model" / f"{name.replace(' ', '.').replace('/', '_')}.progress.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**state, **changes}))


def training_log(path: Path, steps: int = 60) -> Path:
    lines = []
    for step in range(1, steps + 1):
        held_out = {"fvu": 1 / step, "l0": 32.0, "silent": 0.2} if step % 5 == 0 else None
        lines.append({"step": step, "fvu": 0.9, "dead": step / 1000, "lr": 0.0025, "held_out": held_out})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def drawn(logs: Path, width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, legacy_windows=False)
    console.print(View(logs))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n").split("\n")


def test_nothing_runs(tmp_path: Path):
    text = "\n".join(drawn(tmp_path / "no logs"))
    assert "no running job" in text
    assert "snakemake --cores" in text


def test_a_training_with_its_curves(tmp_path: Path):
    log = training_log(tmp_path / "log.jsonl")
    job(tmp_path, "train_dictionary main resid.12", curves=str(log))
    job(tmp_path, "cache_gradients train", what="pairs", facts={}, remaining=None)
    text = "\n".join(drawn(tmp_path))
    assert "2 running jobs" in text
    for expected in (
        "train_dictionary main",
        "40 %",
        "fvu 0.1234",
        "1 min 15 s",
        "2 min 10 s",
        "cache_gradients",
    ):
        assert expected in text
    assert "train_dictionary main resid.12: steps 600 of 1500" in text
    fvu, l0, dead, rate = (line for line in drawn(tmp_path) if "→" in line)
    assert "held-out FVU" in fvu
    assert " ██████▆▆▆▆▅" in fvu  # measured every 5 of 60 steps, in 44 columns
    assert "0.2 → 0.01667, log" in fvu
    assert "held-out L0" in l0
    assert "▁" * 12 in l0
    assert "32 → 32" in l0
    assert "dead share" in dead
    assert "0.001 → 0.06" in dead
    assert "learning rate" in rate
    assert "0.0025" in rate


@pytest.mark.parametrize("jobs", [1, 3, 40])
@pytest.mark.parametrize(("width", "height"), [(100, 30), (80, 24), (100, 12)])
def test_it_fits_into_the_terminal(tmp_path: Path, jobs: int, width: int, height: int):
    log = training_log(tmp_path / "log.jsonl", steps=2000)
    for number in range(jobs):
        job(tmp_path, f"train_dictionary study/topk-k32-seed{number} resid.12", curves=str(log))
    lines = drawn(tmp_path, width, height)
    assert len(lines) <= height
    assert max(cell_len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert f"{jobs} running job" in text
    assert ("more not shown" in text) is (jobs == 40)
    assert ("held-out FVU" in text) is (height > 12 or jobs == 1)


def test_a_real_training_writes_what_the_view_reads(tmp_path: Path):
    manifest = write_store(tmp_path, "activations", {SITE: planted(512, 16, 24, 3, seed=0)[0]}, [3])
    logs = tmp_path / "logs"
    progress.announce("train_dictionary main resid.1", logs / "train.progress.json")
    try:
        train(manifest, tmp_path / "run", params())
        text = "\n".join(drawn(logs))
    finally:
        progress.finish()
        progress.announce("", None)
    last = read_lines(tmp_path / "run" / "log.jsonl")[-1]
    assert f"train_dictionary main resid.1: steps {last['step']} of {last['step']}" in text
    assert f"held-out FVU{last['held_out']['fvu']:>11.4g}" in text
    assert text.count("→") == 4


def test_jobs_that_are_dead_or_torn_are_left_out(tmp_path: Path):
    job(tmp_path, "alive")
    job(tmp_path, "killed", pid=2**22 + 1)
    job(tmp_path, "elsewhere", pid=2**22 + 1, host="another-host")
    (tmp_path / "torn.progress.json").write_text('{"job": "to')
    text = "\n".join(drawn(tmp_path))
    assert "alive" in text
    assert "elsewhere" in text
    assert "killed" not in text
    assert "2 running jobs" in text


def test_a_training_that_has_measured_nothing(tmp_path: Path):
    job(tmp_path, "train_dictionary main resid.12", curves=str(tmp_path / "not yet.jsonl"))
    assert "\n".join(drawn(tmp_path)).count("nothing measured yet") == 4


def test_half_a_line_is_left_for_the_next_time(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_lines(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def points(*values: float) -> list[tuple[int, float]]:
    return list(enumerate(values, start=1))


def test_sparkline():
    assert sparkline(points(0, 1, 2, 3, 4, 5, 6, 7), 8, 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(points(0, 2, 6, 8), 4, 2) == "▁█"  # means 1 and 7
    assert sparkline(points(3, 3), 2, 4) == "▁▁▁▁"
    assert sparkline(points(1, 10, 100), 3, 3, logarithmic=True) == "▁▅█"
    assert sparkline(points(0, 10), 2, 2, logarithmic=True) == "▁█"  # no logarithm of 0
    assert sparkline([(3, 0.0), (6, 7.0)], 8, 8) == "▁▁▁▁▁███"  # held until the next value
    assert sparkline(points(float("nan")), 1, 3) == "   "

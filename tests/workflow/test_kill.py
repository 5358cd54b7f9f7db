"""Runs killed at random moments and started again give the bytes of a run never killed, and repeat nothing finished."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.workflow.conftest import Clone, copy_repository
from tests.workflow.test_invalidation import digests

KILLS = int(os.environ.get("CIRCUITFLOW_KILLS", "3"))
"""Per stage; `make kills` takes more."""
CHECKPOINT_SECONDS = "0.2"


@dataclass(frozen=True)
class Scenario:
    """A configuration whose stages last a few seconds each, and what of it is killed."""

    configuration: str
    edits: Mapping[str, str]
    targets: Mapping[str, str]
    """File that is asked for, by the rule that is killed on the way to it; the last one needs all before."""

    def clone(self, root: Path) -> Clone:
        clone = copy_repository(root, self.configuration)
        text = clone.config.read_text(encoding="utf-8")
        for old, new in self.edits.items():
            assert old in text, old
            text = text.replace(old, new)
        clone.config.write_text(text, encoding="utf-8")
        return clone

    @property
    def results(self) -> str:
        return f"results/{self.configuration}"


SCENARIOS = {
    "a harvest and a dictionary": Scenario(
        configuration="tiny",
        edits={
            "- {kind: task, tokens: 4000}": "- {kind: bundled, tokens: 60000}",
            "epochs: 4.0": "epochs: 8.0",
            "sites: [resid.0, resid.1, resid.2]": "sites: [resid.1]",
            "shard_rows: 1024": "shard_rows: 256",
            "batch_blocks: 8}": "batch_blocks: 1}",
        },
        targets={
            "cache_activations": "results/tiny/activations/manifest.json",
            "train_dictionary": "results/tiny/dictionaries/topk-8/resid.1.json",
        },
    ),
    "a fine-tuning and a crosscoder": Scenario(
        configuration="tiny-diffing",
        edits={"steps: 200": "steps: 400", "epochs: 12.0": "epochs: 24.0"},
        targets={
            "fine_tune_model": "results/tiny-diffing/diffing/echoes/model/manifest.json",
            "train_diffing_crosscoder": "results/tiny-diffing/dictionaries/echoes/crosscoder.json",
        },
    ),
}
RESUMED = re.compile(r"going on after an interruption: (\d+) of|resumed after step (\d+) of")
"""How the logs name the block or step from which a killed job went on."""


def start(clone: Clone, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "snakemake", "--configfile", "run.yaml", "--cores", "2", *arguments]
    environment = {**clone.environment(), "CIRCUITFLOW_CHECKPOINT_SECONDS": CHECKPOINT_SECONDS}
    with open(clone.root / "screen.txt", "ab") as screen:
        return subprocess.Popen(command, cwd=clone.root, env=environment, stdout=screen, stderr=screen)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all below it: no handler runs, nothing is tidied up."""
    below = psutil.Process(process.pid).children(recursive=True)
    for one in [process.pid, *(child.pid for child in below)]:
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    psutil.wait_procs(below, timeout=10)


def in_progress(clone: Clone, rule: str) -> bool:
    return any((clone.root / "logs").rglob(f"{rule}*.progress.json"))


def kill_during(clone: Clone, rule: str, target: str, wait: float) -> bool:
    """Start a run, kill it ``wait`` seconds after the rule has begun its work; False if it ended before."""
    for stale in (clone.root / "logs").rglob("*.progress.json"):
        stale.unlink()
    process = start(clone, target)
    deadline = time.monotonic() + 120
    while not in_progress(clone, rule):
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    time.sleep(wait)
    if process.poll() is not None:
        return False
    kill_tree(process)
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_runs_give_the_bytes_of_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    reference, killed = scenario.clone(tmp_path / "reference"), scenario.clone(tmp_path / "killed")
    reference.snakemake("--", *scenario.targets.values())
    rng = random.Random(0)
    for rule, target in scenario.targets.items():
        kills = 0
        for _ in range(3 * KILLS):
            kills += kill_during(killed, rule, target, rng.uniform(0.1, 0.8))
            assert killed.circuitflow("unlock").returncode == 0
            if kills == KILLS:
                break
        assert kills == KILLS, f"{rule} ended before it could be killed {KILLS} times"
        finish = start(killed, target)
        assert finish.wait() == 0, (killed.root / "screen.txt").read_text()
        log = "".join(path.read_text() for path in (killed.root / "logs").rglob(f"{rule}*.log"))
        resumed = [int(block or step) for block, step in RESUMED.findall(log)]
        assert max(resumed) > 0, f"{rule} began again each time"
        assert resumed == sorted(resumed), f"{rule} lost a finished step"
    results = scenario.results
    assert digests(killed.root / results) == digests(reference.root / results)
    assert object_files(killed, results) == object_files(reference, results)


def object_files(clone: Clone, results: str) -> dict[str, bytes]:
    """Shards, weights and logs inside the objects themselves."""
    root = clone.root / results / "objects"
    names = ("weights.safetensors", "log.jsonl", "shards.json")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and (path.name in names or "/c/" in str(path))
    }

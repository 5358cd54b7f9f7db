"""Copies of the repository in which the tiny configuration has run, and a way to ask what would run again."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COPIED = (
    "Snakefile",
    "rules",
    "workflow_scripts",
    "circuitflow",
    "resources",
    "profiles",
    "slurm",
    "envs",
    "configs",
)
EXPERIMENTS = ("faithfulness", "error_nodes", "validation", "compare", "effects")
"""Targets beside the default one that only collect files."""

GRAPHS = ("transcoders", "graphs", "graph_experiments", "crosscoder")
"""Those of dictionaries that span sites, and of attribution graphs."""

COLLECTING = ("all", "total", "diff", *EXPERIMENTS, *GRAPHS)
"""Lines of a plan that are no work."""

FEWER = {
    "sites: [resid.0, resid.1, resid.2]": "sites: [resid.0, resid.1]",
    "overlap_at: [5, 20]": "overlap_at: [5], compare: [atp, exact], budget: 8, bootstrap: 50",
    "edges: {pool: 12}": "edges: {pool: 8, draws: 5}",
    "nodes: {top: 20}": "nodes: {top: 10}",
    "edges: {top: 40}": "edges: {top: 20}\n  stability: 20",
    "counts: [1, 5, 20, 50, 100]": """counts: [2, 10]
  shares: [0.1, 1.0]
  further_ablations: [zero]
  errors: [removed]
  edges: {counts: [4, 8], random_counts: [4], random_draws: 2, pairs: 4}""",
    "random_counts: [5, 20]": "random_counts: [5]",
    "random_draws: 20": "random_draws: 2",
    "pairs: 16": "pairs: 4",
    "bootstrap: 200": "bootstrap: 50",
    "features: {top: 5": """error_nodes:
  widths: [1]
  thresholds: [0.1]
  positions: false
  baselines: [top-1]
  restore_top: [1, 3]
  restore_width: 1
  heatmap_top: 3
  ridge: 0.001
  rows: 1000
audit: {nodes: 12, edges: 8, pairs: 4, bootstrap: 50}
comparison:
  contenders: [{name: neurons, dictionaries: {kind: identity}}]
  counts: [5, 20]
  shares: [0.1, 1.0]
  size: 10
effects: {top: 10, multiples: [0.0, 2.0], pairs: 4, tokens: 3}
features: {top: 2""",
}
"""What the experiments' run has less of than the tiny configuration, and its settings of the experiments."""

STATS_ROW = re.compile(r"^(\w+)\s+(\d+)$", re.MULTILINE)


@dataclass
class Clone:
    """A working copy of the workflow with a configuration of its own, ``run.yaml``."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "run.yaml"

    def snakemake(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakemake", "--configfile", "run.yaml", "--cores", "2", *arguments]
        done = subprocess.run(command, cwd=self.root, env=self.environment(), capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def circuitflow(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = "from circuitflow.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
        )

    def planned(self, *arguments: str) -> dict[str, int]:
        """Jobs by rule that a run would do now; ``all`` and targets of experiments left out."""
        output = self.snakemake("-n", "--quiet", "rules", *arguments).stdout
        jobs = {name: int(count) for name, count in STATS_ROW.findall(output)}
        return {name: count for name, count in jobs.items() if name not in COLLECTING}

    def environment(self) -> dict[str, str]:
        """The copy's library comes before an installed one."""
        return {**os.environ, "PYTHONPATH": str(self.root), "HF_HUB_OFFLINE": "1"}

    @contextmanager
    def edited(self, file: str, old: str, new: str) -> Iterator[None]:
        """A text edit for the time of the block; afterwards the file is as it was, modification time included."""
        path = self.root / file
        text, times = path.read_text(encoding="utf-8"), path.stat()
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def copy_repository(target: Path, configuration: str = "tiny") -> Clone:
    """The files that a run needs, without results; its configuration is one of ``configs/``."""
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target / name)
    shutil.copy2(ROOT / f"configs/{configuration}.yaml", target / "run.yaml")
    return Clone(target)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy in which the tiny configuration has run to its end. Tests leave it as they found it."""
    clone = copy_repository(tmp_path_factory.mktemp("finished"))
    clone.snakemake()
    return clone


@pytest.fixture(scope="session")
def experimented(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy in which the default target and every experiment have run, smaller than the tiny configuration.

    Tests leave it as they found it.
    """
    clone = copy_repository(tmp_path_factory.mktemp("experimented"))
    text = clone.config.read_text(encoding="utf-8")
    for old, new in FEWER.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    clone.config.write_text(text, encoding="utf-8")
    clone.snakemake("--", "all", *EXPERIMENTS)
    return clone


@pytest.fixture(scope="session")
def graphed(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy with transcoders, attribution graphs and a crosscoder. Tests leave it as they found it."""
    clone = copy_repository(tmp_path_factory.mktemp("graphed"))
    clone.snakemake("--", *GRAPHS)
    return clone


@pytest.fixture(scope="session")
def diffed(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy in which a model and its fine-tuned second have been compared. Tests leave it as they found it."""
    clone = copy_repository(tmp_path_factory.mktemp("diffed"), "tiny-diffing")
    clone.snakemake("--", "diff")
    return clone

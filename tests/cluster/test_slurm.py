"""The workflow on a cluster: what the profile asks for, and a whole run on a real Slurm.

A Slurm of this machine alone will do (``.ci/slurm.sh`` starts one). Under ``CI=true`` its absence fails.
"""

import filecmp
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HEAVY = (
    "cache_activations",
    "train_dictionary",
    "cache_gradients",
    "score_edges",
    "cache_means",
    "evaluate_circuit",
    "evaluate_conditions",
    "evaluate_edges",
    "measure_components",
    "ablate_error_nodes",
    "decompose_errors",
    "audit_circuit",
    "evaluate_budget",
    "measure_effects",
)
TINY = ("--configfile", "configs/tiny.yaml")
NOT_COPIED = shutil.ignore_patterns(".*cache*", ".git", ".snakemake", ".venv*", "results", "logs")
THREE_SITES = "sites: [resid.0, resid.1, resid.2]\n"
TARGETS = ("study", "methods", "faithfulness", "error_nodes", "validation", "compare", "effects")
MEASURED = "benchmarks/"  # seconds and bytes differ from run to run; everything else must not


def snakemake(folder: Path, *arguments: str) -> str:
    """Run Snakemake in a copy of the repository and return what it printed."""
    command = [sys.executable, "-m", "snakemake", "--nocolor", *TINY, *arguments]
    environment = os.environ | {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / ".cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-8000:]}"
    return done.stdout + done.stderr


def fresh_copy(folder: Path) -> Path:
    """The repository as a stranger has it: no results, no caches."""
    return Path(shutil.copytree(ROOT, folder, ignore=NOT_COPIED))


def files_below(folder: Path) -> dict[str, Path]:
    """Relative name → path of every result that equal work must reproduce."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in paths}
    return {name: path for name, path in sorted(names.items()) if not name.startswith(MEASURED)}


def why_no_slurm() -> str | None:
    """Why no job can be run here, or None."""
    if shutil.which("sinfo") is None:
        return "Slurm is not installed (.ci/slurm.sh sets one up)"
    asked = subprocess.run(["sinfo", "-h", "-N", "-o", "%N"], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        return "no Slurm answers (.ci/slurm.sh starts one)"
    nodes = set(asked.stdout.split())
    here = socket.gethostname().split(".")[0]
    return None if nodes == {here} else f"Slurm's nodes {sorted(nodes)} may not see this test's folder"


@pytest.fixture(scope="module")
def slurm() -> None:
    reason = why_no_slurm()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Rule → the resources that a dry run with the cluster profile shows."""
    copy = fresh_copy(tmp_path_factory.mktemp("dry") / "copy")
    for file in (copy / "rules").glob("*.smk"):  # a rule with a message shows that instead of its resources
        file.write_text(re.sub(r"\n *message:\n.*", "", file.read_text()))
    tiny = copy / "configs" / "tiny.yaml"
    pairs = "pairs: {kind: generate, train: 60, test: 12}\n"
    assert pairs in tiny.read_text()
    tiny.write_text(tiny.read_text().replace(pairs, f"{pairs}  clusters: {{site: resid.1, count: 2}}\n"))
    with open(tiny, "a") as file:
        file.write("\nstudy: {name: kinds, site: resid.1, variants: [{kind: topk, k: [4, 8]}]}\n")
    shown = snakemake(copy, "--profile", "slurm", "--dry-run", "--", "all", *TARGETS)
    blocks = re.findall(r"^ *rule (\w+):\n((?: {4,}(?!rule ).*\n)+)", shown, flags=re.MULTILINE)
    return {rule: " ".join(re.findall(r"((?:threads|resources): .*)", block)) for rule, block in blocks}


def test_the_workflow_profile_holds_only_what_suits_every_executor() -> None:
    """It wins over ``--profile slurm``, so a resource here would overrule the cluster's."""
    profile = yaml.safe_load((ROOT / "profiles" / "default" / "config.yaml").read_text())
    assert set(profile) == {"rerun-incomplete"}


def test_every_job_asks_for_memory_and_minutes(dry_run: dict[str, str]) -> None:
    assert len(dry_run) > 10
    for rule, resources in dry_run.items():
        assert re.search(r"\bmem_mb=\d+", resources), rule
        assert re.search(r"\bruntime=\d+", resources), rule


def test_heavy_stages_say_what_they_need_themselves(dry_run: dict[str, str]) -> None:
    default = yaml.safe_load((ROOT / "slurm" / "config.yaml").read_text())["default-resources"]
    for rule in HEAVY:
        asked = {key: int(value) for key, value in re.findall(r"\b(mem_mb|runtime)=(\d+)", dry_run[rule])}
        assert asked != {key: default[key] for key in ("mem_mb", "runtime")}, rule


def test_groups_fit_a_node_of_two_cpus(dry_run: dict[str, str]) -> None:
    """A group asks for the sum of its jobs' CPUs; a rule name that does not exist would be ignored in silence.

    Figures are all in groups, and nothing else is.
    """
    profile = yaml.safe_load((ROOT / "slurm" / "config.yaml").read_text())
    assert set(profile["groups"]) == {rule for rule in dry_run if rule.startswith("plot_")}
    for rule, group in profile["groups"].items():
        threads = re.search(r"threads: (\d+)", dry_run[rule])
        assert profile["group-components"][group] * int(threads[1] if threads else 1) <= 2, rule


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("slurm")
def test_a_cluster_run_has_the_results_of_a_local_run(tmp_path: Path) -> None:
    local, cluster = fresh_copy(tmp_path / "local"), fresh_copy(tmp_path / "cluster")
    for copy in (local, cluster):  # two sites are enough: edges lead from one to the other
        tiny = copy / "configs" / "tiny.yaml"
        assert THREE_SITES in tiny.read_text()
        tiny.write_text(tiny.read_text().replace(THREE_SITES, "sites: [resid.1, resid.2]\n"))
    snakemake(local, "--cores", "2")
    said = snakemake(cluster, "--profile", "slurm", "--slurm-init-seconds-before-status-checks", "8")
    assert "has been submitted with SLURM jobid" in said
    expected, found = files_below(local / "results"), files_below(cluster / "results")
    assert list(found) == list(expected)
    assert len(found) > 20
    assert [name for name in expected if not filecmp.cmp(expected[name], found[name], shallow=False)] == []
    assert "Nothing to be done" in snakemake(cluster, "--cores", "2")


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_a_job_without_a_node_that_fits_is_refused_not_left_waiting() -> None:
    """Groups sum the CPUs of their jobs: here, one that fits nowhere must fail the test, not hang it."""
    shown = subprocess.run(["sinfo", "-h", "-o", "%c"], capture_output=True, text=True, check=True)
    command = ["sbatch", "--test-only", f"--cpus-per-task={int(shown.stdout) + 1}", "--wrap", "true"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0

"""Every target of every ready-made configuration has rules for all its files, or says in a sentence why not."""

import numpy as np
import pytest
import yaml

from tests.workflow.conftest import EXPERIMENTS, ROOT, Clone, copy_repository

PLANNED = {
    "methods": "compare_methods",
    "faithfulness": "evaluate_conditions",
    "error_nodes": "ablate_error_nodes",
    "validation": "validate_scores",
    "compare": "compare_budgets",
    "effects": "measure_effects",
}
"""What must be planned for a target."""

NO_ENCODER = (
    "needs encoders, and a site's dictionary is a decoder alone (format decoder); "
    "choose dictionaries with encoders."
)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy in which nothing has run."""
    return copy_repository(tmp_path_factory.mktemp("fresh"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["config.yaml", *sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml"))]
)
def test_every_target_of_every_configuration_resolves(fresh: Clone, file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    fresh.config.write_text(text, encoding="utf-8")
    config = yaml.safe_load(text)
    study = ["study"] if config.get("study") else []
    planned = fresh.planned("--", "all", "methods", *EXPERIMENTS, *study)
    assert set(PLANNED.values()) <= set(planned)
    clusters = (config["task"].get("clusters") or {}).get("count", 0)
    for rule in (*PLANNED.values(), "audit_circuit", "build_report"):
        assert planned[rule] == 1 + clusters, f"{rule}: one for the task and one for each of its clusters"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy whose dictionaries are decoders alone."""
    clone = copy_repository(tmp_path_factory.mktemp("bare"))
    config = yaml.safe_load(clone.config.read_text(encoding="utf-8"))
    source = {"format": "decoder", "path": "rows.npy"}
    config["dictionaries"] = {"name": "bare", "kind": "pretrained", "source": source}
    config["scores"]["method"] = "decoder_only"
    config["comparison"] = {"contenders": []}
    np.save(clone.root / "rows.npy", np.eye(32, dtype=np.float32))
    clone.config.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return clone


@pytest.mark.slow
@pytest.mark.parametrize("target", PLANNED)
def test_targets_that_need_features_say_so_where_there_is_no_encoder(bare: Clone, target: str) -> None:
    refused = bare.snakemake("--", target, check=False)
    said = refused.stdout + refused.stderr
    assert refused.returncode == 1
    assert said.rstrip().splitlines()[-1] == f"Error: Target {target} {NO_ENCODER}"
    assert "Traceback" not in said
    assert "MissingInput" not in said
    assert not list((bare.root / ".snakemake" / "locks").glob("*")), "the next run must not find a lock"


@pytest.mark.slow
def test_scores_and_rankings_are_made_without_an_encoder(bare: Clone) -> None:
    planned = bare.planned("--", "all")
    assert {"score_nodes", "rank_features", "plot_agreement"} <= set(planned)
    assert not {"evaluate_circuit", "audit_circuit", "build_report"} & set(planned)

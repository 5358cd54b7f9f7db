"""Circuits of running text: contexts without pairs, grouped, and one circuit for each group."""

import json

import numpy as np
import pytest
import yaml

from circuitflow.circuits.circuit import read_circuit
from circuitflow.data.agreement import sentences
from circuitflow.store.tables import read_provenance, read_table
from tests.workflow.conftest import Clone, copy_repository

SITES = 2
IN_A_DOCUMENT = 5
TEXT = {
    "name": "text",
    "pairs": {"kind": "text", "train": 80, "test": 40, "length": 8},
    "metric": {"kind": "logit"},
    "confidence": {"min_difference": None},
    "prepend_bos": True,
    "clusters": {"by": "gradients", "site": "resid.1", "count": 2},
}
PAGES = [f"results/tiny/text/cluster-{number}/topk-8/report.html" for number in range(3)]
OF_ONE_TASK = {
    "cache_gradients": 2,
    "score_nodes": SITES,
    "cache_means": SITES,
    "rank_features": 1,
    "score_edges": SITES,  # into the second site, and into the metric
    "describe_features": SITES,
    "assemble_circuit": 1,
    "circuit_stability": 1,
    "evaluate_circuit": 1,
    "audit_circuit": 1,
    "plot_audit": 1,
    "plot_task_accuracy": 1,
    "plot_layer_importance": 1,
    "plot_agreement": 1,
    "plot_top_features": 1,
    "plot_faithfulness": 1,
    "plot_circuit": 1,
    "plot_circuit_positions": 1,
    "plot_stability": 1,
}


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A copy in which contexts of a text have been grouped into two clusters, each with its page."""
    clone = copy_repository(tmp_path_factory.mktemp("clustered"))
    lines = sentences(seed=3, n=600)
    documents = [" ".join(lines[i : i + IN_A_DOCUMENT]) for i in range(0, len(lines), IN_A_DOCUMENT)]
    text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (clone.root / "text.jsonl").write_text(text, encoding="utf-8")
    config = yaml.safe_load(clone.config.read_text(encoding="utf-8"))
    config["task"], config["sites"] = TEXT, ["resid.1", "resid.2"]
    config["corpus"] |= {
        "sources": [{"kind": "files", "glob": "text.jsonl", "tokens": 6000}],
        "held_out": 0.25,
    }
    clone.config.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    clone.snakemake("--", *PAGES[:2])
    return clone


@pytest.mark.slow
def test_every_cluster_has_its_own_contexts_circuit_and_page(clustered: Clone) -> None:
    folder = clustered.root / "results/tiny/text"
    clusters = read_table(folder / "clusters.parquet")
    sizes = read_provenance(folder / "clusters.parquet")["clusters"]["sizes"]
    assert sum(sizes["train"]) == 80
    assert sum(sizes["test"]) == 40
    circuits = []
    for number in range(2):
        own = folder / f"cluster-{number}"
        for split in ("train", "test"):
            members = (clusters["cluster"] == number) & (clusters["split"] == split)
            table = read_table(own / "confident" / f"{split}.parquet")
            assert table["pair"].tolist() == clusters["pair"][members].tolist()
            assert len(table["pair"]) == sizes[split][number]
        circuits.append(read_circuit(own / "topk-8/circuit.json"))
        assert circuits[-1].provenance["task"] == f"text/cluster-{number}"
        page = (own / "topk-8/report.html").read_text(encoding="utf-8")
        assert f"<title>text/cluster-{number} in tiny" in page
        assert "Clusters of contexts" in page
    assert circuits[0].nodes != circuits[1].nodes
    assert (folder / "figures/clusters.png").is_file()
    assert clustered.planned()["plot_stability"] == 1, "by default, all contexts together get a circuit too"


@pytest.mark.slow
def test_a_circuit_of_text_keeps_the_next_token(clustered: Clone) -> None:
    """The whole model is 1 and the empty circuit 0, with the metric of unpaired text."""
    for number in range(2):
        table = read_table(clustered.root / f"results/tiny/text/cluster-{number}/topk-8/faithfulness.parquet")
        curve = table["series"] == "circuit"
        everything = curve & (table["nodes"] == table["nodes"].max())
        assert table["F"][everything] == pytest.approx(1, abs=1e-4)
        assert np.all(table["m_empty"] > table["m_full"])


@pytest.mark.slow
def test_what_an_edit_of_the_clusters_re_runs(clustered: Clone) -> None:
    assert clustered.planned("--", *PAGES[:2]) == {}
    stages = {"cluster_contexts": 1, "plot_clusters": 1, "build_report": 3}
    with clustered.edited("run.yaml", "count: 2", "count: 3"):
        of_all = {rule: 3 * jobs for rule, jobs in OF_ONE_TASK.items()}
        curves = {
            "plot_training_curves": 1
        }  # of the dictionaries, which are the same: the new cluster's alone
        assert clustered.planned("--", *PAGES) == of_all | stages | curves
    with clustered.edited("circuitflow/plots/context_clusters.py", "EXAMPLES = 5", "EXAMPLES = 4"):
        assert clustered.planned("--", *PAGES[:2]) == {"plot_clusters": 1, "build_report": 2}


@pytest.mark.slow
def test_too_many_clusters_are_refused_with_a_smaller_number(clustered: Clone) -> None:
    with clustered.edited("run.yaml", "count: 2", "count: 40"):
        failed = clustered.snakemake(
            "--", "results/tiny/text/cluster-39/confident/train.parquet", check=False
        )
    assert failed.returncode != 0
    assert "too few for a circuit (it needs 4 and 2); " in failed.stdout + failed.stderr

"""Score the features and the error of one site."""

from circuitflow.attribution.scores import score_nodes
from circuitflow.jobs import run_stage

ARRAYS = ["{site}/clean", "{site}/patched", "{site}/gradient"]

if "snakemake" in globals():
    run_stage(snakemake, score_nodes, arrays={"gradients_train": ARRAYS, "gradients_test": ARRAYS})

"""Score the features and the error of one site."""

from circuitflow.attribution.scores import score_nodes
from circuitflow.jobs import run_stage

ARRAYS = ["{site}/clean", "{site}/patched", "{site}/gradient"]
OF_METHOD = ["{site}/gradient"]

if "snakemake" in globals():
    run_stage(
        snakemake,
        score_nodes,
        arrays={
            "gradients_train": ARRAYS,
            "gradients_test": ARRAYS,
            "method_gradients_train": OF_METHOD,
            "method_gradients_test": OF_METHOD,
        },
    )

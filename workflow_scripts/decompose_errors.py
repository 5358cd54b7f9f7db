"""Split errors into what is linear in the site's vector and the rest."""

from circuitflow.error_nodes.components import arrays_read
from circuitflow.error_nodes.decomposition import decompose_errors
from circuitflow.jobs import run_stage


def _arrays(job):
    return arrays_read(job.params["sites"])


if "snakemake" in globals():
    run_stage(
        snakemake,
        decompose_errors,
        arrays={
            "activations": lambda job: list(job.params["sites"]),
            "gradients_train": _arrays,
            "gradients_test": _arrays,
        },
    )

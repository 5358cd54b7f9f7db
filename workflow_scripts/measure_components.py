"""Measure the changes and gradients behind the scores of error nodes."""

from circuitflow.error_nodes.components import arrays_read, measure_components
from circuitflow.jobs import run_stage


def _arrays(job):
    return arrays_read(job.params["sites"])


if "snakemake" in globals():
    run_stage(snakemake, measure_components, arrays={"gradients_train": _arrays, "gradients_test": _arrays})

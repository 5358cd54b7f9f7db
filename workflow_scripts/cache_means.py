"""Keep the mean activations of one site over the patched inputs of one split."""

from circuitflow.circuits.means import KIND, cache_means
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(
        snakemake,
        cache_means,
        kind=KIND,
        arrays={"gradients": ["{site}/clean", "{site}/patched"]},
    )

"""Keep clean and patched activations and gradients of one split."""

from circuitflow.attribution.gradients import cache_gradients
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, cache_gradients, kind="store")

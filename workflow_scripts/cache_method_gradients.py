"""Cache the gradients of a node method other than AtP."""

from circuitflow.attribution.path_gradients import cache_method_gradients
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, cache_method_gradients, kind="store")

"""Keep activations of every site from one forward pass."""

from circuitflow.data.activations import cache_activations
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, cache_activations, kind="store")

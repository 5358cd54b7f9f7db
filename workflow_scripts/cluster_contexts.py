"""Split a task's pairs into clusters."""

from circuitflow.attribution.clustering import cluster_contexts
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, cluster_contexts)

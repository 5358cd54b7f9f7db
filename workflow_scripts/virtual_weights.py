"""Compute virtual weights of the most influential features of one graph."""

from circuitflow.graphs.virtual import virtual_weights
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, virtual_weights)

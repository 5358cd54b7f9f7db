"""Ablate error nodes and restore features."""

from circuitflow.error_nodes.experiments import ablate_error_nodes
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, ablate_error_nodes)

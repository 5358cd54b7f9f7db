"""Prune the attribution graph of one prompt."""

from circuitflow.graphs.pruning import prune_graph
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, prune_graph)

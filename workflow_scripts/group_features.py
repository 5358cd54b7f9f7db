"""Find the supernodes of a graph."""

from circuitflow.graphs.supernodes import group_features
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, group_features)

"""Describe the features of the pruned attribution graphs."""

from circuitflow.graphs.describing import describe_graph_features
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, describe_graph_features)

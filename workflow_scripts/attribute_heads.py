"""Split a graph's edges by attention head."""

from circuitflow.graphs.heads import attribute_heads
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, attribute_heads)

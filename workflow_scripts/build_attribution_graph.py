"""Build the attribution graph of one prompt."""

from circuitflow.graphs.stage import build_attribution_graph
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, build_attribution_graph)

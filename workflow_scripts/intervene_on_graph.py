"""Hold features of a graph's prompt at other values."""

from circuitflow.graphs.interventions import intervene_on_graph
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, intervene_on_graph)

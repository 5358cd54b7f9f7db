"""Write the pruned attribution graph of a prompt as viewers read it."""

from circuitflow.graphs.exporting import export_graph
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, export_graph)

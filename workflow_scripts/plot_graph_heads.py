"""Draw the figure heads of a graph."""

from circuitflow.jobs import run_light
from circuitflow.plots.graph_heads import plot_graph_heads

if "snakemake" in globals():
    run_light(snakemake, plot_graph_heads)

"""Draw the figure supernodes of a graph."""

from circuitflow.jobs import run_light
from circuitflow.plots.graph_supernodes import plot_graph_supernodes

if "snakemake" in globals():
    run_light(snakemake, plot_graph_supernodes)

"""Draw the figure interventions of a graph."""

from circuitflow.jobs import run_light
from circuitflow.plots.graph_interventions import plot_graph_interventions

if "snakemake" in globals():
    run_light(snakemake, plot_graph_interventions)

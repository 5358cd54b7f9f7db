"""Draw the figure attribution_graph."""

from circuitflow.jobs import run_light
from circuitflow.plots.attribution_graph import plot_attribution_graph

if "snakemake" in globals():
    run_light(snakemake, plot_attribution_graph)

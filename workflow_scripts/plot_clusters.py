"""Draw the figure clusters."""

from circuitflow.jobs import run_light
from circuitflow.plots.context_clusters import plot_clusters

if "snakemake" in globals():
    run_light(snakemake, plot_clusters)

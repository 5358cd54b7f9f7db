"""Draw the figure error_heatmap."""

from circuitflow.jobs import run_light
from circuitflow.plots.error_heatmap import plot_error_heatmap

if "snakemake" in globals():
    run_light(snakemake, plot_error_heatmap)

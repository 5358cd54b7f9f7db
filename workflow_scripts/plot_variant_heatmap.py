"""Draw the figure variant_heatmap."""

from circuitflow.jobs import run_light
from circuitflow.plots.variant_heatmap import plot_variant_heatmap

if "snakemake" in globals():
    run_light(snakemake, plot_variant_heatmap)

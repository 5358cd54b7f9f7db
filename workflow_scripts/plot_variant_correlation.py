"""Draw the figure variant_correlation."""

from circuitflow.jobs import run_light
from circuitflow.plots.variant_correlation import plot_variant_correlation

if "snakemake" in globals():
    run_light(snakemake, plot_variant_correlation)

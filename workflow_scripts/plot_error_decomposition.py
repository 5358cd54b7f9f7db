"""Draw the figure error_decomposition."""

from circuitflow.jobs import run_light
from circuitflow.plots.error_decomposition import plot_error_decomposition

if "snakemake" in globals():
    run_light(snakemake, plot_error_decomposition)

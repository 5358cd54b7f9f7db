"""Draw the figure error_restoration."""

from circuitflow.jobs import run_light
from circuitflow.plots.error_restoration import plot_error_restoration

if "snakemake" in globals():
    run_light(snakemake, plot_error_restoration)

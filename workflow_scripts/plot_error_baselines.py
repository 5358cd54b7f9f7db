"""Draw the figure error_baselines."""

from circuitflow.jobs import run_light
from circuitflow.plots.error_baselines import plot_error_baselines

if "snakemake" in globals():
    run_light(snakemake, plot_error_baselines)

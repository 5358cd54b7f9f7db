"""Draw the figure error_windows."""

from circuitflow.jobs import run_light
from circuitflow.plots.error_windows import plot_error_windows

if "snakemake" in globals():
    run_light(snakemake, plot_error_windows)

"""Draw the figure error_components."""

from circuitflow.jobs import run_light
from circuitflow.plots.error_components import plot_error_components

if "snakemake" in globals():
    run_light(snakemake, plot_error_components)

"""Draw the figure validation."""

from circuitflow.jobs import run_light
from circuitflow.plots.validation import plot_validation

if "snakemake" in globals():
    run_light(snakemake, plot_validation)

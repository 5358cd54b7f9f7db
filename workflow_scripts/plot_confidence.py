"""Draw the figure confidence."""

from circuitflow.jobs import run_light
from circuitflow.plots.confidence import plot_confidence

if "snakemake" in globals():
    run_light(snakemake, plot_confidence)

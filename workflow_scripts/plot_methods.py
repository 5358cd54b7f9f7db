"""Draw the figure methods."""

from circuitflow.jobs import run_light
from circuitflow.plots.methods import plot_methods

if "snakemake" in globals():
    run_light(snakemake, plot_methods)

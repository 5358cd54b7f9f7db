"""Draw the figure diffing."""

from circuitflow.jobs import run_light
from circuitflow.plots.diffing import plot_diffing

if "snakemake" in globals():
    run_light(snakemake, plot_diffing)

"""Draw the figure composition."""

from circuitflow.jobs import run_light
from circuitflow.plots.composition import plot_composition

if "snakemake" in globals():
    run_light(snakemake, plot_composition)

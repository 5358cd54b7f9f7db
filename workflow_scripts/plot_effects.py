"""Draw the figure effects."""

from circuitflow.jobs import run_light
from circuitflow.plots.effects import plot_effects

if "snakemake" in globals():
    run_light(snakemake, plot_effects)

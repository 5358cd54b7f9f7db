"""Draw the figure stability."""

from circuitflow.jobs import run_light
from circuitflow.plots.stability import plot_stability

if "snakemake" in globals():
    run_light(snakemake, plot_stability)

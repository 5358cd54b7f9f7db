"""Draw the figure agreement."""

from circuitflow.jobs import run_light
from circuitflow.plots.agreement import plot_agreement

if "snakemake" in globals():
    run_light(snakemake, plot_agreement)

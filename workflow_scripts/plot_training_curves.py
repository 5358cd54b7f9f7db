"""Draw the figure training_curves."""

from circuitflow.jobs import run_light
from circuitflow.plots.training_curves import plot_training_curves

if "snakemake" in globals():
    run_light(snakemake, plot_training_curves)

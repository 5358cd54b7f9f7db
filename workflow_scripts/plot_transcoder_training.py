"""Draw the figure transcoder_training."""

from circuitflow.jobs import run_light
from circuitflow.plots.spanning_training import plot_spanning_training

if "snakemake" in globals():
    run_light(snakemake, plot_spanning_training)

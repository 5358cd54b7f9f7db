"""Draw the figure crosscoder_layers."""

from circuitflow.jobs import run_light
from circuitflow.plots.crosscoder_layers import plot_crosscoder_layers

if "snakemake" in globals():
    run_light(snakemake, plot_crosscoder_layers)

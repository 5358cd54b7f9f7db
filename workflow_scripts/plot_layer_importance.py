"""Draw the figure layer_importance."""

from circuitflow.jobs import run_light
from circuitflow.plots.layer_importance import plot_layer_importance

if "snakemake" in globals():
    run_light(snakemake, plot_layer_importance)

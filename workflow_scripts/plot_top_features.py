"""Draw the figure top_features."""

from circuitflow.jobs import run_light
from circuitflow.plots.top_features import plot_top_features

if "snakemake" in globals():
    run_light(snakemake, plot_top_features)

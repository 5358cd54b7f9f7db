"""Draw the figure study_weights."""

from circuitflow.jobs import run_light
from circuitflow.plots.study_weights import plot_study_weights

if "snakemake" in globals():
    run_light(snakemake, plot_study_weights)

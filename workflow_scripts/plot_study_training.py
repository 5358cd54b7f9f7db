"""Draw the figure study_training."""

from circuitflow.jobs import run_light
from circuitflow.plots.study_training import plot_study_training

if "snakemake" in globals():
    run_light(snakemake, plot_study_training)

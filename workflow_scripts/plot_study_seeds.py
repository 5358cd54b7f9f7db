"""Draw the figure study_seeds."""

from circuitflow.jobs import run_light
from circuitflow.plots.study_seeds import plot_study_seeds

if "snakemake" in globals():
    run_light(snakemake, plot_study_seeds)

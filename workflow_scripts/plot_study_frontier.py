"""Draw the figure study_frontier."""

from circuitflow.jobs import run_light
from circuitflow.plots.study_frontier import plot_study_frontier

if "snakemake" in globals():
    run_light(snakemake, plot_study_frontier)

"""Draw the figure study_firing."""

from circuitflow.jobs import run_light
from circuitflow.plots.study_firing import plot_study_firing

if "snakemake" in globals():
    run_light(snakemake, plot_study_firing)

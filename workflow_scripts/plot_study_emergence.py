"""Draw the figure study_emergence."""

from circuitflow.jobs import run_light
from circuitflow.plots.study_emergence import plot_study_emergence

if "snakemake" in globals():
    run_light(snakemake, plot_study_emergence)

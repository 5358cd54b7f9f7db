"""Draw the figure outliers."""

from circuitflow.jobs import run_light
from circuitflow.plots.outliers import plot_outliers

if "snakemake" in globals():
    run_light(snakemake, plot_outliers)

"""Draw the figure error_ablation."""

from circuitflow.jobs import run_light
from circuitflow.plots.error_ablation import plot_error_ablation

if "snakemake" in globals():
    run_light(snakemake, plot_error_ablation)

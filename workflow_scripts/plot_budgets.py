"""Draw the figure budgets."""

from circuitflow.jobs import run_light
from circuitflow.plots.budgets import plot_budgets

if "snakemake" in globals():
    run_light(snakemake, plot_budgets)

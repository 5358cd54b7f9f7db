"""Draw the figure faithfulness_conditions."""

from circuitflow.jobs import run_light
from circuitflow.plots.faithfulness_conditions import plot_faithfulness_conditions

if "snakemake" in globals():
    run_light(snakemake, plot_faithfulness_conditions)

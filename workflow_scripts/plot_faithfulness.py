"""Draw the figure faithfulness."""

from circuitflow.jobs import run_light
from circuitflow.plots.faithfulness import plot_faithfulness

if "snakemake" in globals():
    run_light(snakemake, plot_faithfulness)

"""Draw the figure edge_faithfulness."""

from circuitflow.jobs import run_light
from circuitflow.plots.edge_faithfulness import plot_edge_faithfulness

if "snakemake" in globals():
    run_light(snakemake, plot_edge_faithfulness)

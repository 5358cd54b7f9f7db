"""Draw the figure motifs of all graphs."""

from circuitflow.jobs import run_light
from circuitflow.plots.graph_motifs import plot_graph_motifs

if "snakemake" in globals():
    run_light(snakemake, plot_graph_motifs)

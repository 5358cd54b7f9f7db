"""Draw the figure transcoder_quality."""

from circuitflow.jobs import run_light
from circuitflow.plots.spanning_quality import plot_spanning_quality

if "snakemake" in globals():
    run_light(snakemake, plot_spanning_quality)

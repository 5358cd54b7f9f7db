"""Draw the figure variant_map."""

from circuitflow.jobs import run_light
from circuitflow.plots.variant_map import plot_variant_map

if "snakemake" in globals():
    run_light(snakemake, plot_variant_map)

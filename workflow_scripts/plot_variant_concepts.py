"""Draw the figure variant_concepts."""

from circuitflow.jobs import run_light
from circuitflow.plots.variant_concepts import plot_variant_concepts

if "snakemake" in globals():
    run_light(snakemake, plot_variant_concepts)

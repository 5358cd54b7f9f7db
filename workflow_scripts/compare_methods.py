"""Compare node methods with a reference."""

from circuitflow.attribution.methods import compare_methods
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, compare_methods)

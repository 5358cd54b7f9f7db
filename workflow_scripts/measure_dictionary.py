"""Measure one dictionary on held-out text."""

from circuitflow.dictionaries.measuring import measure_dictionary
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, measure_dictionary, arrays={"activations": ["{site}"]})

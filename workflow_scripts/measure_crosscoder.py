"""Measure a crosscoder on held-out text."""

from circuitflow.dictionaries.measuring_families import measure_family
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, measure_family)

"""Measure the model on every prompt and keep the confident ones."""

from circuitflow.data.confidence import filter_pairs
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, filter_pairs)

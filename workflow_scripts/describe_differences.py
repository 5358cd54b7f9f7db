"""Find what the features that tell two models apart fire on."""

from circuitflow.diffing.describing import describe_differences
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, describe_differences)

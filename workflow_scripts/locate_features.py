"""Find in which sites each feature of a crosscoder lives."""

from circuitflow.dictionaries.locating import locate_features
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, locate_features)

"""Compare the dictionaries of a study."""

from circuitflow.features.comparison import compare_variants
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, compare_variants)

"""Compare two models by the crosscoder of both."""

from circuitflow.diffing.comparison import compare_models
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, compare_models)

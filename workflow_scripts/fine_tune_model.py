"""Make a second model of the run's by a brief fine-tuning."""

from circuitflow.diffing.tuning import fine_tune_model
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, fine_tune_model, kind="model")

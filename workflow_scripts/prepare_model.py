"""Fetch or open the model and keep it as safetensors."""

from circuitflow.jobs import run_stage
from circuitflow.models.sources import prepare_model

if "snakemake" in globals():
    run_stage(snakemake, prepare_model, kind="model", checks={"required_sites": snakemake.config["sites"]})

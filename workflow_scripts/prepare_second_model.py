"""Fetch or open the second model, check it against the first and keep it as safetensors."""

from circuitflow.diffing.second import prepare_second_model
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    site = snakemake.config["diffing"]["site"]
    run_stage(snakemake, prepare_second_model, kind="model", checks={"required_sites": [site]})

"""Make a small model, train it on sentences of the task and keep it as safetensors."""

from circuitflow.jobs import run_stage
from circuitflow.models.toy import prepare_toy

if "snakemake" in globals():
    run_stage(snakemake, prepare_toy, kind="model", checks={"required_sites": snakemake.config["sites"]})

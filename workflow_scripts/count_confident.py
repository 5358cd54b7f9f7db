"""Count the prompts that pass thresholds of confidence."""

from circuitflow.data.confident import count_confident
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, count_confident)

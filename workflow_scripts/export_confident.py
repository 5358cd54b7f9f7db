"""Write the confident pairs as JSON lines."""

from circuitflow.data.confident import export_confident
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, export_confident)

"""Write agreement pairs for both splits."""

from circuitflow.data.agreement import generate_pairs
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, generate_pairs)

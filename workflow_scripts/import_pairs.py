"""Read the user's pairs or prompts."""

from circuitflow.data.importing import import_pairs
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, import_pairs)

"""Draw contexts from the corpus's text."""

from circuitflow.data.text import sample_contexts
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, sample_contexts)

"""Hold scores against true patching effects."""

from circuitflow.attribution.validation import validate_scores
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, validate_scores)

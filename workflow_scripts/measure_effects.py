"""Measure what the circuit does on single prompts."""

from circuitflow.circuits.effects import measure_effects
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, measure_effects)

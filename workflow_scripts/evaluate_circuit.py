"""Measure faithfulness and completeness against node count."""

from circuitflow.circuits.faithfulness import evaluate_circuit
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, evaluate_circuit)

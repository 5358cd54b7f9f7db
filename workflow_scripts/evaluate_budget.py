"""Evaluate one contender at every budget."""

from circuitflow.circuits.budgets import evaluate_budget
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, evaluate_budget)

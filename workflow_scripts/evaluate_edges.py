"""Measure the faithfulness of a circuit's strongest edges."""

from circuitflow.circuits.edge_faithfulness import evaluate_edges
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, evaluate_edges)

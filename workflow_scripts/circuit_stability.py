"""Measure how stable the nodes and edges of the circuit are."""

from circuitflow.circuits.stability import circuit_stability
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, circuit_stability)

"""Audit the circuit."""

from circuitflow.circuits.audit import audit_circuit
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, audit_circuit)

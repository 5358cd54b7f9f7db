"""Search the smallest circuit that is faithful enough."""

from circuitflow.circuits.search import search_circuit
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, search_circuit)

"""Choose nodes and edges."""

from circuitflow.circuits.assembly import assemble_circuit
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, assemble_circuit)

"""Draw the figure circuit."""

from circuitflow.jobs import run_light
from circuitflow.plots.circuit import plot_circuit

if "snakemake" in globals():
    run_light(snakemake, plot_circuit)

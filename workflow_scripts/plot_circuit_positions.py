"""Draw the figure circuit_positions."""

from circuitflow.jobs import run_light
from circuitflow.plots.circuit_positions import plot_circuit_positions

if "snakemake" in globals():
    run_light(snakemake, plot_circuit_positions)

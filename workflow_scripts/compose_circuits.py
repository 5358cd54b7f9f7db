"""Count what circuits of growing size are made of."""

from circuitflow.circuits.composition import compose
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, compose)

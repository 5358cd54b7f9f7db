"""Make one store of the activations of two models."""

from circuitflow.diffing.joining import arrays_read, join_activations
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    read = arrays_read(dict(snakemake.params.items()))
    run_stage(snakemake, join_activations, kind="store", arrays=read)

"""Make one store of the activations of two models."""

from circuitflow.diffing.joining import join_activations
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    site = [snakemake.params.site]
    run_stage(snakemake, join_activations, kind="store", arrays={"base": site, "tuned": site})

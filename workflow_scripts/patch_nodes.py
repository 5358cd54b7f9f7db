"""Patch the nodes of one site one by one."""

from circuitflow.attribution.exact import patch_nodes
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, patch_nodes)

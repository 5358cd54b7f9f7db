"""Rank nodes, compare splits, sum layers."""

from circuitflow.attribution.ranking import rank_features
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, rank_features)

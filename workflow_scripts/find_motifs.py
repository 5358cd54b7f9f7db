"""Find chains of features that recur across graphs."""

from circuitflow.graphs.motifs import find_motifs
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, find_motifs)

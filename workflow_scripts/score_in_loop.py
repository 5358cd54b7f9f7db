"""Score the nodes of every site with the dictionaries inside the model."""

from circuitflow.attribution.in_loop import score_in_loop
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, score_in_loop)

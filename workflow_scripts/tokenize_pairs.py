"""Turn pairs into aligned tokens; tabulate what was dropped and why."""

from circuitflow.data.tokenization import tokenize_pairs
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, tokenize_pairs)

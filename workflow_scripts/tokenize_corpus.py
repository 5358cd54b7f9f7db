"""Pack text into blocks of tokens."""

from circuitflow.data.corpus import tokenize_corpus
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, tokenize_corpus, kind="store")

"""Find what the top features of one site fire on."""

from circuitflow.features.contexts import describe_features
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, describe_features, arrays={"activations": ["{site}"]})

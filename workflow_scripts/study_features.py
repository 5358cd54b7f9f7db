"""Study the features of one variant's dictionary on held-out text."""

from circuitflow.features.study import study_features
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, study_features, arrays={"activations": [snakemake.params.site]})

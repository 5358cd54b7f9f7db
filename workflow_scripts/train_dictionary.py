"""Train (or make) one site's dictionary."""

from circuitflow.dictionaries.training import train_dictionary
from circuitflow.jobs import run_stage
from circuitflow.tracking import tracking_of

if "snakemake" in globals():
    run_stage(
        snakemake,
        train_dictionary,
        kind="dictionary",
        arrays={"activations": ["{site}"]},
        checks={"tracking": tracking_of(snakemake)},
    )

"""Train a cross-layer transcoder."""

from circuitflow.dictionaries.spanning import train_family
from circuitflow.jobs import run_stage
from circuitflow.tracking import tracking_of

if "snakemake" in globals():
    run_stage(
        snakemake,
        train_family,
        kind="dictionary",
        checks={"tracking": tracking_of(snakemake)},
    )

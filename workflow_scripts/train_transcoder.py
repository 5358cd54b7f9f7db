"""Train the transcoder of one layer."""

from circuitflow.dictionaries.spanning import train_family
from circuitflow.jobs import run_stage
from circuitflow.tracking import tracking_of

if "snakemake" in globals():
    run_stage(
        snakemake,
        train_family,
        kind="dictionary",
        arrays={"activations": ["mlp_in.{layer}", "mlp.{layer}"]},
        checks={"tracking": tracking_of(snakemake)},
    )

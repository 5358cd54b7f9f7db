"""Train the crosscoder of several sites."""

from circuitflow.dictionaries.spanning import train_family
from circuitflow.jobs import run_stage
from circuitflow.tracking import tracking_of


def read_sites(job):
    """Arrays of the store that it reads."""
    return job.params.members[0][0]


if "snakemake" in globals():
    run_stage(
        snakemake,
        train_family,
        kind="dictionary",
        arrays={"activations": read_sites},
        checks={"tracking": tracking_of(snakemake)},
    )

"""Score edges into one site, or into the metric."""

from circuitflow.attribution.cached import PARTS
from circuitflow.attribution.edges import score_edges
from circuitflow.jobs import run_stage


def read(job):
    """The arrays of the gradient store that the stage reads."""
    return [f"{site}/{part}" for site in job.params.sites for part in PARTS]


if "snakemake" in globals():
    run_stage(snakemake, score_edges, arrays={"gradients": read})

"""Score edges between two neighbouring sites."""

from circuitflow.attribution.edges import score_edges
from circuitflow.jobs import run_stage

ARRAYS = [f"{{{end}}}/{array}" for end in ("up", "down") for array in ("clean", "patched", "gradient")]

if "snakemake" in globals():
    run_stage(snakemake, score_edges, arrays={"gradients": ARRAYS})

"""Draw the figure audit."""

from circuitflow.jobs import run_light
from circuitflow.plots.audit import plot_audit

if "snakemake" in globals():
    run_light(snakemake, plot_audit)

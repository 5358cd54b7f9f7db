"""Draw the figure task_accuracy."""

from circuitflow.jobs import run_light
from circuitflow.plots.task_accuracy import plot_task_accuracy

if "snakemake" in globals():
    run_light(snakemake, plot_task_accuracy)

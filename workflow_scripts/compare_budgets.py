"""Compare contenders at equal budgets."""

from circuitflow.circuits.budget_tables import compare_budgets
from circuitflow.jobs import run_light

if "snakemake" in globals():
    run_light(snakemake, compare_budgets)

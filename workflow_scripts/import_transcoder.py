"""Import the transcoder of one layer."""

from circuitflow.dictionaries.importing_families import import_family
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, import_family, kind="dictionary")

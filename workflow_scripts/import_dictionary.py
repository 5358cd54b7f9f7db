"""Import one site's dictionary from files of another library."""

from circuitflow.dictionaries.importing import import_dictionary
from circuitflow.jobs import run_stage

if "snakemake" in globals():
    run_stage(snakemake, import_dictionary, kind="dictionary", arrays={"activations": ["{site}"]})

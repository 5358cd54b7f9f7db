import os
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from circuitflow.config_checks import check_against_model, parse_config
from circuitflow.errors import UserError
from circuitflow.locking import record_owner

min_version("9.27")

# A --configfile takes the place of config.yaml; Snakemake would merge the two.
if not workflow.configfiles:

    configfile: "config.yaml"


try:
    CFG = parse_config(config)
    check_against_model(CFG, Path(f"results/{CFG.model.name}/model/manifest.json"))
except UserError as error:
    raise WorkflowError(str(error)) from None

# What jobs inherit; threads of NumPy would change sums.
os.environ.update(CIRCUITFLOW_RECOMPUTE=CFG.recompute, OPENBLAS_NUM_THREADS="1")


include: "rules/common.smk"
include: "rules/model.smk"
include: "rules/data.smk"
include: "rules/dictionaries.smk"
include: "rules/attribution.smk"
include: "rules/methods.smk"
include: "rules/clusters.smk"
include: "rules/circuits.smk"
include: "rules/features.smk"
include: "rules/figures.smk"
include: "rules/circuit_figures.smk"
include: "rules/report.smk"
include: "rules/study.smk"
include: "rules/study_figures.smk"
include: "rules/variant_figures.smk"
include: "rules/requests.smk"


onstart:
    record_owner(Path(".snakemake"))
    if not ENCODED:
        print(
            "A site's dictionary has no encoder: scores and rankings are made, but no circuit and no page."
        )


rule all:
    default_target: True
    input:
        KEPT,
        OF_FEATURES if ENCODED else OF_SCORES,

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


# In this order: later files use names of earlier ones.
for family in """
    common parameters model data dictionaries attribution methods clusters circuits means
    faithfulness faithfulness_figures error_nodes error_node_figures validation comparison effects
    features figures circuit_figures report study study_figures variant_figures
    transcoders transcoder_figures crosscoders crosscoder_layers graphs graph_figures graph_experiments
    graph_experiment_figures diffing diffing_results requests workarounds
""".split():

    include: f"rules/{family}.smk"


CODE.remember()


onstart:
    look_only_when_jobs_end()
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

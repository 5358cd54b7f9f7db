# What error nodes do: components of their scores, experiments with them ablated, what they are made of.
OF_ERRORS = [
    *(
        f"{SET}/error_nodes/{table}.parquet"
        for table in (
            "components",
            "components.pairs",
            "experiments",
            "decomposition",
        )
    ),
    *(
        f"{SET}/figures/error_{figure}.{kind}"
        for figure in (
            "components",
            "ablation",
            "restoration",
            "heatmap",
            "windows",
            "baselines",
            "decomposition",
        )
        for kind in ("png", "svg")
    ),
]


rule measure_components:
    input:
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
    output:
        components=f"{SET}/error_nodes/components.parquet",
        pairs=f"{SET}/error_nodes/components.pairs.parquet",
    log:
        f"{LOGS}/{{task}}/measure_components.log",
    benchmark:
        f"{ROWS}/{{task}}/measure_components.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=30,
        gpu=GPU,
    params:
        sites=SITES,
        bootstrap=CFG.evaluation.bootstrap,
        seed=CFG.evaluation.seed,
        compute=COMPUTE,
        code=code("measure_components"),
    message:
        "Measure the changes and gradients behind the scores of error nodes"
    script:
        "../workflow_scripts/measure_components.py"


rule ablate_error_nodes:
    input:
        model=f"{MODEL}/model/manifest.json",
        nodes=f"{SET}/ranking/nodes.parquet",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
        means=MEANS,
    output:
        experiments=f"{SET}/error_nodes/experiments.parquet",
    log:
        f"{LOGS}/{{task}}/ablate_error_nodes.log",
    benchmark:
        f"{ROWS}/{{task}}/ablate_error_nodes.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        **CFG.error_nodes.model_dump(exclude={"ridge", "rows"}),
        **CFG.evaluation.model_dump(
            include={
                "pairs",
                "ablation",
                "aggregate",
                "bootstrap",
                "seed",
                "batch_rows",
            }
        ),
        sites=SITES,
        ranking=CFG.scores.ranking,
        metric=METRIC,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("ablate_error_nodes"),
    message:
        "Ablate error nodes and restore features"
    script:
        "../workflow_scripts/ablate_error_nodes.py"


rule decompose_errors:
    input:
        activations=f"{MODEL}/activations/manifest.json",
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
    output:
        decomposition=f"{SET}/error_nodes/decomposition.parquet",
    log:
        f"{LOGS}/{{task}}/decompose_errors.log",
    benchmark:
        f"{ROWS}/{{task}}/decompose_errors.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        sites=SITES,
        ridge=CFG.error_nodes.ridge,
        rows=CFG.error_nodes.rows,
        bootstrap=CFG.evaluation.bootstrap,
        seed=CFG.evaluation.seed,
        compute=COMPUTE,
        code=code("decompose_errors"),
    message:
        "Split errors into what is linear in the site's vector and the rest"
    script:
        "../workflow_scripts/decompose_errors.py"


rule error_nodes:
    input:
        with_features("error_nodes", lambda: of_tasks(OF_ERRORS)),

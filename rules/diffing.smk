# What a second model has that the run's own has not: the target `diff`.
include: "diffing_paths.smk"


rule diff:
    input:
        diff_results,


if TUNED_BY:

    rule fine_tune_model:
        input:
            model=f"{MODEL}/model/manifest.json",
            pairs=TUNING_PAIRS,
            files=TUNING_FILES,
        output:
            manifest=SECOND_MODEL,
        log:
            f"{LOGS}/diffing/fine_tune_model.{DIFF_NAME}.log",
        benchmark:
            f"{ROWS}/diffing/fine_tune_model.{DIFF_NAME}.tsv"
        conda:
            ENVIRONMENT
        threads: CFG.compute.threads
        resources:
            mem_mb=lambda wildcards, attempt: 12000 * attempt,
            runtime=240,
            gpu=GPU,
        params:
            **TUNED_BY.model_dump(),
            compute=COMPUTE,
            code=code("fine_tune_model"),
        message:
            "Make a second model by fine-tuning the first"
        script:
            "../workflow_scripts/fine_tune_model.py"

elif DIFFED:

    rule prepare_second_model:
        input:
            model=f"{MODEL}/model/manifest.json",
            files=SECOND_FILES,
        output:
            manifest=SECOND_MODEL,
        log:
            f"{LOGS}/diffing/prepare_second_model.{DIFF_NAME}.log",
        benchmark:
            f"{ROWS}/diffing/prepare_second_model.{DIFF_NAME}.tsv"
        conda:
            ENVIRONMENT
        resources:
            mem_mb=lambda wildcards, attempt: 6000 * attempt,
            runtime=60,
        params:
            source=DIFFED.model.model_dump(),
            architecture=CFG.model.architecture,
            code=code("prepare_second_model"),
        message:
            "Make the second model ready"
        script:
            "../workflow_scripts/prepare_second_model.py"


if DIFF_SITE not in SITES:

    use rule cache_activations as cache_first_activations with:
        output:
            manifest=FIRST_ACTIVATIONS,
        log:
            f"{LOGS}/diffing/cache_first_activations.{DIFF_NAME}.log",
        benchmark:
            f"{ROWS}/diffing/cache_first_activations.{DIFF_NAME}.tsv"
        params:
            **HARVEST_OF_SITE,
            code=code("cache_activations"),
        message:
            "Run the first model over the corpus for {DIFF_SITE}"


use rule cache_activations as cache_second_activations with:
    input:
        model=SECOND_MODEL,
        corpus=f"{MODEL}/corpus/manifest.json",
    output:
        manifest=SECOND_ACTIVATIONS,
    log:
        f"{LOGS}/diffing/cache_second_activations.{DIFF_NAME}.log",
    benchmark:
        f"{ROWS}/diffing/cache_second_activations.{DIFF_NAME}.tsv"
    params:
        **HARVEST_OF_SITE,
        code=code("cache_activations"),
    message:
        "Run the second model over the corpus for {DIFF_SITE}"


rule join_activations:
    input:
        base=FIRST_ACTIVATIONS,
        tuned=SECOND_ACTIVATIONS,
        model_base=f"{MODEL}/model/manifest.json",
        model_tuned=SECOND_MODEL,
    output:
        manifest=BOTH_ACTIVATIONS,
    log:
        f"{LOGS}/diffing/join_activations.{DIFF_NAME}.log",
    benchmark:
        f"{ROWS}/diffing/join_activations.{DIFF_NAME}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=30,
    params:
        site=DIFF_SITE,
        code=code("join_activations"),
    message:
        "Put both models' activations side by side"
    script:
        "../workflow_scripts/join_activations.py"


rule train_diffing_crosscoder:
    input:
        activations=BOTH_ACTIVATIONS,
    output:
        manifest=DIFF_CROSSCODER,
    log:
        f"{LOGS}/diffing/train_diffing_crosscoder.{DIFF_NAME}.log",
    benchmark:
        f"{ROWS}/diffing/train_diffing_crosscoder.{DIFF_NAME}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        members=crosscoder([f"{model}:{DIFF_SITE}" for model in ("base", "tuned")]),
        settings=DIFFED.settings() if DIFFED else {},
        compute=COMPUTE,
        code=code("train_crosscoder"),
    message:
        "Train the crosscoder of both models at {DIFF_SITE}"
    script:
        "../workflow_scripts/train_crosscoder.py"

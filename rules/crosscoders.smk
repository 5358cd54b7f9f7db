# One dictionary of several sites of the model: the target `crosscoder`.


rule crosscoder:
    input:
        crosscoder_results,


if CROSS and not set(CROSS.sites) <= set(SITES):

    use rule cache_activations as cache_crosscoder_activations with:
        output:
            manifest=CROSS_ACTIVATIONS,
        log:
            f"{LOGS}/cache_crosscoder_activations.{CROSS_NAME}.log",
        benchmark:
            f"{ROWS}/cache_crosscoder_activations.{CROSS_NAME}.tsv"
        params:
            **harvest_of(CROSS, CROSS.sites),
            code=code("cache_activations"),
        message:
            "Run the model over the corpus for the sites of the crosscoder"


if CROSS:

    rule train_crosscoder:
        input:
            activations=CROSS_ACTIVATIONS,
        output:
            manifest=f"{CROSSCODER}/crosscoder.json",
        log:
            f"{LOGS}/train_crosscoder.{CROSS_NAME}.log",
        benchmark:
            f"{ROWS}/train_crosscoder.{CROSS_NAME}.tsv"
        conda:
            ENVIRONMENT
        threads: CFG.compute.threads
        resources:
            mem_mb=lambda wildcards, attempt: 8000 * attempt,
            runtime=240,
            gpu=GPU,
        params:
            members=crosscoder(CROSS.sites),
            settings=CROSS.settings(),
            compute=COMPUTE,
            code=code("train_crosscoder"),
        message:
            "Train the crosscoder ({CROSS_NAME})"
        script:
            "../workflow_scripts/train_crosscoder.py"

    rule measure_crosscoder:
        input:
            model=f"{MODEL}/model/manifest.json",
            corpus=f"{MODEL}/corpus/manifest.json",
            activations=CROSS_ACTIVATIONS,
            dictionaries=f"{CROSSCODER}/crosscoder.json",
        output:
            quality=f"{CROSSCODER}/quality.parquet",
        log:
            f"{LOGS}/measure_crosscoder.{CROSS_NAME}.log",
        benchmark:
            f"{ROWS}/measure_crosscoder.{CROSS_NAME}.tsv"
        conda:
            ENVIRONMENT
        threads: CFG.compute.threads
        resources:
            mem_mb=lambda wildcards, attempt: 6000 * attempt,
            runtime=60,
            gpu=GPU,
        params:
            **CFG.measure.model_dump(),
            dtype=CFG.model.dtype,
            compute=COMPUTE,
            code=code("measure_crosscoder"),
        message:
            "Measure the crosscoder ({CROSS_NAME}) on held-out text"
        script:
            "../workflow_scripts/measure_crosscoder.py"

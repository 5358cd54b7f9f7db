# Transcoders of the MLPs, which attribution graphs are made of: the target `transcoders`.
include: "transcoder_paths.smk"


rule transcoders:
    input:
        transcoder_results,


if SPAN:

    use rule cache_activations as cache_transcoder_activations with:
        output:
            manifest=SPAN_ACTIVATIONS,
        log:
            f"{LOGS}/cache_transcoder_activations.{SPAN_NAME}.log",
        benchmark:
            f"{ROWS}/cache_transcoder_activations.{SPAN_NAME}.tsv"
        params:
            **harvest_of(SPAN, SPAN_SITES),
            code=code("cache_activations"),
        message:
            "Run the model over the corpus for what MLPs read and write"

    rule measure_transcoders:
        input:
            model=f"{MODEL}/model/manifest.json",
            corpus=f"{MODEL}/corpus/manifest.json",
            activations=SPAN_ACTIVATIONS,
            dictionaries=TRANSCODER_FILES,
        output:
            quality=f"{TRANSCODERS}/quality.parquet",
        log:
            f"{LOGS}/measure_transcoders.{SPAN_NAME}.log",
        benchmark:
            f"{ROWS}/measure_transcoders.{SPAN_NAME}.tsv"
        conda:
            ENVIRONMENT
        threads: CFG.compute.threads
        resources:
            mem_mb=lambda wildcards, attempt: 6000 * attempt,
            runtime=120,
            gpu=GPU,
        params:
            **CFG.measure.model_dump(),
            dtype=CFG.model.dtype,
            compute=COMPUTE,
            code=code("measure_transcoders"),
        message:
            "Measure the transcoders ({SPAN_NAME}) on held-out text"
        script:
            "../workflow_scripts/measure_transcoders.py"


if IS_TRAINED_SPAN and IS_CROSS_LAYER:

    rule train_cross_layer:
        input:
            activations=SPAN_ACTIVATIONS,
        output:
            manifest=f"{TRANSCODERS}/cross_layer.json",
        log:
            f"{LOGS}/train_cross_layer.{SPAN_NAME}.log",
        benchmark:
            f"{ROWS}/train_cross_layer.{SPAN_NAME}.tsv"
        conda:
            ENVIRONMENT
        threads: CFG.compute.threads
        resources:
            mem_mb=lambda wildcards, attempt: 16000 * attempt,
            runtime=600,
            gpu=GPU,
        params:
            members=cross_layer(SPAN_LAYERS),
            settings=SPAN.of_layer(SPAN_LAYERS[0]),
            compute=COMPUTE,
            code=code("train_cross_layer"),
        message:
            "Train the cross-layer transcoder ({SPAN_NAME})"
        script:
            "../workflow_scripts/train_cross_layer.py"

elif IS_TRAINED_SPAN:

    rule train_transcoder:
        input:
            activations=SPAN_ACTIVATIONS,
        output:
            manifest=f"{TRANSCODERS}/mlp_in.{{layer}}.json",
        log:
            f"{LOGS}/train_transcoder.{SPAN_NAME}.{{layer}}.log",
        benchmark:
            f"{ROWS}/train_transcoder.{SPAN_NAME}.{{layer}}.tsv"
        wildcard_constraints:
            layer=r"\d+",
        conda:
            ENVIRONMENT
        threads: CFG.compute.threads
        resources:
            mem_mb=lambda wildcards, attempt: 8000 * attempt,
            runtime=240,
            gpu=GPU,
        params:
            members=lambda wildcards: transcoder(int(wildcards.layer)),
            settings=lambda wildcards: SPAN.of_layer(int(wildcards.layer)),
            compute=COMPUTE,
            code=code("train_transcoder"),
        message:
            "Train the transcoder of layer {wildcards.layer} ({SPAN_NAME})"
        script:
            "../workflow_scripts/train_transcoder.py"

elif IS_CROSS_LAYER:

    rule import_cross_layer:
        input:
            activations=SPAN_ACTIVATIONS,
            source=span_source,
        output:
            manifest=f"{TRANSCODERS}/cross_layer.json",
        log:
            f"{LOGS}/import_cross_layer.{SPAN_NAME}.log",
        benchmark:
            f"{ROWS}/import_cross_layer.{SPAN_NAME}.tsv"
        conda:
            ENVIRONMENT
        resources:
            mem_mb=lambda wildcards, attempt: 16000 * attempt,
            runtime=60,
        params:
            layers=SPAN_LAYERS,
            settings=SPAN.of_layer(SPAN_LAYERS[0]),
            compute=COMPUTE,
            code=code("import_cross_layer"),
        message:
            "Import the cross-layer transcoder ({SPAN_NAME})"
        script:
            "../workflow_scripts/import_cross_layer.py"

elif SPAN:

    rule import_transcoder:
        input:
            activations=SPAN_ACTIVATIONS,
            source=span_source,
        output:
            manifest=f"{TRANSCODERS}/mlp_in.{{layer}}.json",
        log:
            f"{LOGS}/import_transcoder.{SPAN_NAME}.{{layer}}.log",
        benchmark:
            f"{ROWS}/import_transcoder.{SPAN_NAME}.{{layer}}.tsv"
        wildcard_constraints:
            layer=r"\d+",
        conda:
            ENVIRONMENT
        resources:
            mem_mb=lambda wildcards, attempt: 8000 * attempt,
            runtime=60,
        params:
            layers=lambda wildcards: [int(wildcards.layer)],
            settings=lambda wildcards: SPAN.of_layer(int(wildcards.layer)),
            compute=COMPUTE,
            code=code("import_transcoder"),
        message:
            "Import the transcoder of layer {wildcards.layer} ({SPAN_NAME})"
        script:
            "../workflow_scripts/import_transcoder.py"

rule train_dictionary:
    input:
        model=f"{MODEL}/model/manifest.json",
        activations=f"{MODEL}/activations/manifest.json",
        weights=lambda wildcards: CFG.dictionary(wildcards.site).weights or [],
    output:
        manifest=f"{TRAINED}/{{site}}.json",
    log:
        f"{LOGS}/train_dictionary.{{site}}.log",
    benchmark:
        f"{ROWS}/train_dictionary.{{site}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        site=lambda wildcards: wildcards.site,
        settings=lambda wildcards: dictionary_settings(wildcards.site),
        compute=COMPUTE,
        code=code("train_dictionary"),
    message:
        "Train the dictionary of {wildcards.site}"
    script:
        "../workflow_scripts/train_dictionary.py"


rule measure_dictionary:
    input:
        model=f"{MODEL}/model/manifest.json",
        corpus=f"{MODEL}/corpus/manifest.json",
        activations=f"{MODEL}/activations/manifest.json",
        dictionary=f"{TRAINED}/{{site}}.json",
    output:
        quality=f"{TRAINED}/{{site}}.quality.parquet",
    log:
        f"{LOGS}/measure_dictionary.{{site}}.log",
    benchmark:
        f"{ROWS}/measure_dictionary.{{site}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 6000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **CFG.measure.model_dump(),
        site=lambda wildcards: wildcards.site,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("measure_dictionary"),
    message:
        "Measure the dictionary of {wildcards.site} on held-out text"
    script:
        "../workflow_scripts/measure_dictionary.py"

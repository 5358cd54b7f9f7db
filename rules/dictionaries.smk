# Dictionaries are made in sets: {set} is the name of the run's own, or {study}/{variant}.


rule train_dictionary:
    input:
        activations=f"{MODEL}/activations/manifest.json",
    output:
        manifest=f"{DICTIONARIES}/{{set}}/{{site}}.json",
    log:
        f"{LOGS}/train_dictionary.{{set}}.{{site}}.log",
    benchmark:
        f"{ROWS}/train_dictionary.{{set}}.{{site}}.tsv"
    wildcard_constraints:
        set=f"(?!(?:{IMPORTED})$)(?:{NAMES})" if IMPORTED else NAMES,
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        site=lambda wildcards: wildcards.site,
        settings=dictionary_settings,
        compute=COMPUTE,
        code=code("train_dictionary"),
    message:
        "Train the dictionary of {wildcards.site} ({wildcards.set})"
    script:
        "../workflow_scripts/train_dictionary.py"


rule import_dictionary:
    input:
        activations=f"{MODEL}/activations/manifest.json",
        source=source_files,
    output:
        manifest=f"{DICTIONARIES}/{{set}}/{{site}}.json",
    log:
        f"{LOGS}/import_dictionary.{{set}}.{{site}}.log",
    benchmark:
        f"{ROWS}/import_dictionary.{{set}}.{{site}}.tsv"
    wildcard_constraints:
        set=f"(?=(?:{IMPORTED})$)(?:{NAMES})" if IMPORTED else "(?!)",
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
    params:
        site=lambda wildcards: wildcards.site,
        settings=dictionary_settings,
        compute=COMPUTE,
        code=code("import_dictionary"),
    message:
        "Import the dictionary of {wildcards.site} ({wildcards.set})"
    script:
        "../workflow_scripts/import_dictionary.py"


rule measure_dictionary:
    input:
        model=f"{MODEL}/model/manifest.json",
        corpus=f"{MODEL}/corpus/manifest.json",
        activations=f"{MODEL}/activations/manifest.json",
        dictionary=f"{DICTIONARIES}/{{set}}/{{site}}.json",
    output:
        quality=f"{DICTIONARIES}/{{set}}/{{site}}.quality.parquet",
    log:
        f"{LOGS}/measure_dictionary.{{set}}.{{site}}.log",
    benchmark:
        f"{ROWS}/measure_dictionary.{{set}}.{{site}}.tsv"
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
        "Measure the dictionary of {wildcards.site} ({wildcards.set}) on held-out text"
    script:
        "../workflow_scripts/measure_dictionary.py"

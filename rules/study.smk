# Several dictionaries of one site side by side: the target `study`, and the tables that its figures are drawn from.
include: "study_paths.smk"


rule study:
    input:
        study_results,
        summary=f"{STUDY}/summary.txt",
    log:
        f"{LOGS}/study.{STUDY_NAME}.log",
    localrule: True
    conda:
        ENVIRONMENT
    message:
        "The variants of the study {STUDY_NAME}"
    shell:
        "tee {log:q} < {input.summary:q}"


rule study_features:
    input:
        model=f"{MODEL}/model/manifest.json",
        corpus=f"{MODEL}/corpus/manifest.json",
        activations=f"{MODEL}/activations/manifest.json",
        dictionary=f"{DICTIONARIES}/{STUDY_NAME}/{{variant}}/{STUDY_SITE}.json",
    output:
        features=f"{STUDY}/{{variant}}/features.parquet",
        emergence=f"{STUDY}/{{variant}}/emergence.parquet",
        checkpoints=f"{STUDY}/{{variant}}/checkpoints.parquet",
        correlation=f"{STUDY}/{{variant}}/correlation.parquet",
        heatmap=f"{STUDY}/{{variant}}/heatmap.parquet",
        projection=f"{STUDY}/{{variant}}/projection.parquet",
    log:
        f"{LOGS}/study_features.{STUDY_NAME}.{{variant}}.log",
    benchmark:
        f"{ROWS}/study_features.{STUDY_NAME}.{{variant}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 6000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        site=STUDY_SITE,
        settings=lambda wildcards: used_settings(
            VARIANTS[wildcards.variant].model_dump()
        ),
        features=CFG.study.features if CFG.study else 0,
        seed=CFG.study.seed if CFG.study else 0,
        compute=COMPUTE,
        code=code("study_features"),
    message:
        "Study the features of {wildcards.variant}"
    script:
        "../workflow_scripts/study_features.py"


rule compare_variants:
    input:
        dictionaries=TRAINED_VARIANTS,
        quality=MEASURED_VARIANTS,
        features=tables_of_variants("features"),
    output:
        variants=f"{STUDY}/variants.parquet",
        seeds=f"{STUDY}/seeds.parquet",
        summary=f"{STUDY}/summary.txt",
    log:
        f"{LOGS}/compare_variants.{STUDY_NAME}.log",
    benchmark:
        f"{ROWS}/compare_variants.{STUDY_NAME}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        site=STUDY_SITE,
        labels=list(VARIANTS),
        settings=[
            used_settings(settings.model_dump()) for settings in VARIANTS.values()
        ],
        seed=CFG.study.seed if CFG.study else 0,
        compute=COMPUTE,
        code=code("compare_variants"),
    message:
        "Compare the variants of the study {STUDY_NAME}"
    script:
        "../workflow_scripts/compare_variants.py"

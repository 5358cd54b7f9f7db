# What the crosscoder of two models says: features compared, described, drawn; part of the target `diff`.


rule compare_models:
    input:
        crosscoder=DIFF_CROSSCODER,
        activations=BOTH_ACTIVATIONS,
    output:
        features=f"{DIFF}/features.parquet",
        summary=f"{DIFF}/summary.json",
    log:
        f"{LOGS}/diffing/compare_models.{DIFF_NAME}.log",
    benchmark:
        f"{ROWS}/diffing/compare_models.{DIFF_NAME}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **diff_settings(
            "site shared error_ratio reconstruction_ratio rows bootstrap bootstrap_seed"
        ),
        compute=COMPUTE,
        code=code("compare_models"),
    message:
        "Tell shared from exclusive features"
    script:
        "../workflow_scripts/compare_models.py"


rule describe_differences:
    input:
        model_base=f"{MODEL}/model/manifest.json",
        model_tuned=SECOND_MODEL,
        crosscoder=DIFF_CROSSCODER,
        activations=BOTH_ACTIVATIONS,
        corpus=f"{MODEL}/corpus/manifest.json",
        features=f"{DIFF}/features.parquet",
    output:
        descriptions=f"{DIFF}/descriptions.json",
    log:
        f"{LOGS}/diffing/describe_differences.{DIFF_NAME}.log",
    benchmark:
        f"{ROWS}/diffing/describe_differences.{DIFF_NAME}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 6000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **CFG.features.model_dump(include={"contexts", "window", "logits"}),
        **diff_settings("top"),
        compute=COMPUTE,
        code=code("describe_differences"),
    message:
        "Find what the features that tell the models apart fire on"
    script:
        "../workflow_scripts/describe_differences.py"


rule plot_diffing:
    input:
        features=f"{DIFF}/features.parquet",
        summary=f"{DIFF}/summary.json",
    output:
        png=report(
            f"{DIFF}/figures/diffing.png",
            caption="../resources/captions/diffing.rst",
            category="Diffing",
        ),
        svg=f"{DIFF}/figures/diffing.svg",
    log:
        f"{LOGS}/diffing/plot_diffing.{DIFF_NAME}.log",
    benchmark:
        f"{ROWS}/diffing/plot_diffing.{DIFF_NAME}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        models=DIFF_MODELS,
        code=code("plot_diffing"),
    message:
        "Draw the figure diffing"
    script:
        "../workflow_scripts/plot_diffing.py"

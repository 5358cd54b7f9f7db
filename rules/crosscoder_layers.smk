# In which sites the features of the crosscoder live; part of the target `crosscoder`.
if CROSS:

    rule locate_features:
        input:
            crosscoder=f"{CROSSCODER}/crosscoder.json",
            activations=CROSS_ACTIVATIONS,
        output:
            features=f"{CROSSCODER}/features.parquet",
            norms=f"{CROSSCODER}/norms.parquet",
        log:
            f"{LOGS}/locate_features.{CROSS_NAME}.log",
        benchmark:
            f"{ROWS}/locate_features.{CROSS_NAME}.tsv"
        conda:
            ENVIRONMENT
        threads: CFG.compute.threads
        resources:
            mem_mb=lambda wildcards, attempt: 8000 * attempt,
            runtime=60,
            gpu=GPU,
        params:
            rows=100_000,
            compute=COMPUTE,
            code=code("locate_features"),
        message:
            "Find in which sites the features of {CROSS_NAME} live"
        script:
            "../workflow_scripts/locate_features.py"

    rule plot_crosscoder_layers:
        input:
            features=f"{CROSSCODER}/features.parquet",
            norms=f"{CROSSCODER}/norms.parquet",
        output:
            png=report(
                f"{CROSSCODER}/figures/layers.png",
                caption="../resources/captions/crosscoder_layers.rst",
                category="Crosscoder",
            ),
            svg=f"{CROSSCODER}/figures/layers.svg",
        log:
            f"{LOGS}/plot_crosscoder_layers.{CROSS_NAME}.log",
        benchmark:
            f"{ROWS}/plot_crosscoder_layers.{CROSS_NAME}.tsv"
        conda:
            ENVIRONMENT
        params:
            style=STYLE | {"subject": CFG.model.name},
            code=code("plot_crosscoder_layers"),
        message:
            "Draw where the features of {CROSS_NAME} live"
        script:
            "../workflow_scripts/plot_crosscoder_layers.py"

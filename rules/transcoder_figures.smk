# Figures of transcoders and of the crosscoder.

if SPAN:

    rule plot_transcoder_quality:
        input:
            quality=f"{TRANSCODERS}/quality.parquet",
        output:
            png=report(
                f"{TRANSCODERS}/figures/quality.png",
                caption="../resources/captions/transcoder_quality.rst",
                category="Transcoders",
            ),
            svg=f"{TRANSCODERS}/figures/quality.svg",
        log:
            f"{LOGS}/plot_transcoder_quality.{SPAN_NAME}.log",
        benchmark:
            f"{ROWS}/plot_transcoder_quality.{SPAN_NAME}.tsv"
        conda:
            ENVIRONMENT
        params:
            style=STYLE | {"subject": CFG.model.name},
            code=code("plot_transcoder_quality"),
        message:
            "Draw how well the transcoders ({SPAN_NAME}) do"
        script:
            "../workflow_scripts/plot_transcoder_quality.py"


if IS_TRAINED_SPAN:

    rule plot_transcoder_training:
        input:
            dictionaries=TRANSCODER_FILES,
        output:
            png=report(
                f"{TRANSCODERS}/figures/training.png",
                caption="../resources/captions/transcoder_training.rst",
                category="Transcoders",
            ),
            svg=f"{TRANSCODERS}/figures/training.svg",
        log:
            f"{LOGS}/plot_transcoder_training.{SPAN_NAME}.log",
        benchmark:
            f"{ROWS}/plot_transcoder_training.{SPAN_NAME}.tsv"
        conda:
            ENVIRONMENT
        params:
            style=STYLE | {"subject": CFG.model.name},
            code=code("plot_transcoder_training"),
        message:
            "Draw the training of the transcoders ({SPAN_NAME})"
        script:
            "../workflow_scripts/plot_transcoder_training.py"


if CROSS:

    rule plot_crosscoder_quality:
        input:
            quality=f"{CROSSCODER}/quality.parquet",
        output:
            png=report(
                f"{CROSSCODER}/figures/quality.png",
                caption="../resources/captions/crosscoder_quality.rst",
                category="Crosscoder",
            ),
            svg=f"{CROSSCODER}/figures/quality.svg",
        log:
            f"{LOGS}/plot_crosscoder_quality.{CROSS_NAME}.log",
        benchmark:
            f"{ROWS}/plot_crosscoder_quality.{CROSS_NAME}.tsv"
        conda:
            ENVIRONMENT
        params:
            style=STYLE | {"subject": CFG.model.name},
            code=code("plot_crosscoder_quality"),
        message:
            "Draw how well the crosscoder ({CROSS_NAME}) does"
        script:
            "../workflow_scripts/plot_crosscoder_quality.py"

    rule plot_crosscoder_training:
        input:
            dictionaries=f"{CROSSCODER}/crosscoder.json",
        output:
            png=report(
                f"{CROSSCODER}/figures/training.png",
                caption="../resources/captions/crosscoder_training.rst",
                category="Crosscoder",
            ),
            svg=f"{CROSSCODER}/figures/training.svg",
        log:
            f"{LOGS}/plot_crosscoder_training.{CROSS_NAME}.log",
        benchmark:
            f"{ROWS}/plot_crosscoder_training.{CROSS_NAME}.tsv"
        conda:
            ENVIRONMENT
        params:
            style=STYLE | {"subject": CFG.model.name},
            code=code("plot_crosscoder_training"),
        message:
            "Draw the training of the crosscoder ({CROSS_NAME})"
        script:
            "../workflow_scripts/plot_crosscoder_training.py"

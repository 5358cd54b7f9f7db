# Figures of a whole study, all variants in one.


rule plot_study_training:
    input:
        dictionaries=TRAINED_VARIANTS,
    output:
        png=report(
            f"{STUDY}/figures/training.png",
            caption="../resources/captions/study_training.rst",
            category="Study",
        ),
        svg=f"{STUDY}/figures/training.svg",
    log:
        f"{LOGS}/plot_study_training.{STUDY_NAME}.log",
    benchmark:
        f"{ROWS}/plot_study_training.{STUDY_NAME}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        code=code("plot_study_training"),
    message:
        "Draw the figure training of the study"
    script:
        "../workflow_scripts/plot_study_training.py"


rule plot_study_frontier:
    input:
        variants=f"{STUDY}/variants.parquet",
    output:
        png=report(
            f"{STUDY}/figures/frontier.png",
            caption="../resources/captions/study_frontier.rst",
            category="Study",
        ),
        svg=f"{STUDY}/figures/frontier.svg",
    log:
        f"{LOGS}/plot_study_frontier.{STUDY_NAME}.log",
    benchmark:
        f"{ROWS}/plot_study_frontier.{STUDY_NAME}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        code=code("plot_study_frontier"),
    message:
        "Draw the figure frontier of the study"
    script:
        "../workflow_scripts/plot_study_frontier.py"


rule plot_study_weights:
    input:
        features=tables_of_variants("features"),
    output:
        png=report(
            f"{STUDY}/figures/weights.png",
            caption="../resources/captions/study_weights.rst",
            category="Study",
        ),
        svg=f"{STUDY}/figures/weights.svg",
    log:
        f"{LOGS}/plot_study_weights.{STUDY_NAME}.log",
    benchmark:
        f"{ROWS}/plot_study_weights.{STUDY_NAME}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        code=code("plot_study_weights"),
    message:
        "Draw the figure weights of the study"
    script:
        "../workflow_scripts/plot_study_weights.py"


rule plot_study_firing:
    input:
        features=tables_of_variants("features"),
        checkpoints=tables_of_variants("checkpoints"),
    output:
        png=report(
            f"{STUDY}/figures/firing.png",
            caption="../resources/captions/study_firing.rst",
            category="Study",
        ),
        svg=f"{STUDY}/figures/firing.svg",
    log:
        f"{LOGS}/plot_study_firing.{STUDY_NAME}.log",
    benchmark:
        f"{ROWS}/plot_study_firing.{STUDY_NAME}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        code=code("plot_study_firing"),
    message:
        "Draw the figure firing of the study"
    script:
        "../workflow_scripts/plot_study_firing.py"


rule plot_study_emergence:
    input:
        checkpoints=tables_of_variants("checkpoints"),
    output:
        png=report(
            f"{STUDY}/figures/emergence.png",
            caption="../resources/captions/study_emergence.rst",
            category="Study",
        ),
        svg=f"{STUDY}/figures/emergence.svg",
    log:
        f"{LOGS}/plot_study_emergence.{STUDY_NAME}.log",
    benchmark:
        f"{ROWS}/plot_study_emergence.{STUDY_NAME}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        code=code("plot_study_emergence"),
    message:
        "Draw the figure emergence of the study"
    script:
        "../workflow_scripts/plot_study_emergence.py"


rule plot_study_seeds:
    input:
        seeds=f"{STUDY}/seeds.parquet",
    output:
        png=report(
            f"{STUDY}/figures/seeds.png",
            caption="../resources/captions/study_seeds.rst",
            category="Study",
        ),
        svg=f"{STUDY}/figures/seeds.svg",
    log:
        f"{LOGS}/plot_study_seeds.{STUDY_NAME}.log",
    benchmark:
        f"{ROWS}/plot_study_seeds.{STUDY_NAME}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        code=code("plot_study_seeds"),
    message:
        "Draw the figure seeds of the study"
    script:
        "../workflow_scripts/plot_study_seeds.py"

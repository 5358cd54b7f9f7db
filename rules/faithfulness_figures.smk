# Figures of the target `faithfulness`.


rule plot_faithfulness_conditions:
    input:
        faithfulness=f"{SET}/conditions.parquet",
        areas=f"{SET}/conditions.areas.parquet",
    output:
        png=report(
            f"{SET}/figures/faithfulness_conditions.png",
            caption="../resources/captions/faithfulness_conditions.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/faithfulness_conditions.svg",
    log:
        f"{LOGS}/{{task}}/plot_faithfulness_conditions.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_faithfulness_conditions.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        code=code("plot_faithfulness_conditions"),
    message:
        "Draw the figure faithfulness_conditions"
    script:
        "../workflow_scripts/plot_faithfulness_conditions.py"


rule plot_composition:
    input:
        composition=f"{SET}/composition.parquet",
    output:
        png=report(
            f"{SET}/figures/composition.png",
            caption="../resources/captions/composition.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/composition.svg",
    log:
        f"{LOGS}/{{task}}/plot_composition.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_composition.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        code=code("plot_composition"),
    message:
        "Draw the figure composition"
    script:
        "../workflow_scripts/plot_composition.py"


rule plot_outliers:
    input:
        prompts=f"{SET}/faithfulness.prompts.parquet",
    output:
        png=report(
            f"{SET}/figures/outliers.png",
            caption="../resources/captions/outliers.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/outliers.svg",
    log:
        f"{LOGS}/{{task}}/plot_outliers.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_outliers.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        code=code("plot_outliers"),
    message:
        "Draw the figure outliers"
    script:
        "../workflow_scripts/plot_outliers.py"


rule plot_confidence:
    input:
        confidence=f"{TASK}/confidence.parquet",
    output:
        png=report(
            f"{SET}/figures/confidence.png",
            caption="../resources/captions/confidence.rst",
            category="Task",
        ),
        svg=f"{SET}/figures/confidence.svg",
    log:
        f"{LOGS}/{{task}}/plot_confidence.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_confidence.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        chosen=CFG.task.confidence.model_dump(),
        code=code("plot_confidence"),
    message:
        "Draw the figure confidence"
    script:
        "../workflow_scripts/plot_confidence.py"


rule plot_edge_faithfulness:
    input:
        edges=f"{SET}/edge_faithfulness.parquet",
    output:
        png=report(
            f"{SET}/figures/edge_faithfulness.png",
            caption="../resources/captions/edge_faithfulness.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/edge_faithfulness.svg",
    log:
        f"{LOGS}/{{task}}/plot_edge_faithfulness.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_edge_faithfulness.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        code=code("plot_edge_faithfulness"),
    message:
        "Draw the figure edge_faithfulness"
    script:
        "../workflow_scripts/plot_edge_faithfulness.py"

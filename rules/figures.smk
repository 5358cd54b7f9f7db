rule plot_task_accuracy:
    input:
        prompts=f"{TASK}/confident/prompts.parquet",
    output:
        png=report(
            f"{SET}/figures/task_accuracy.png",
            caption="../resources/captions/task_accuracy.rst",
            category="Task",
        ),
        svg=f"{SET}/figures/task_accuracy.svg",
    log:
        f"{LOGS}/{{task}}/plot_task_accuracy.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_task_accuracy.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        code=code("plot_task_accuracy"),
    message:
        "Draw the figure task_accuracy"
    script:
        "../workflow_scripts/plot_task_accuracy.py"


rule plot_training_curves:
    input:
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
    output:
        png=report(
            f"{SET}/figures/training_curves.png",
            caption="../resources/captions/training_curves.rst",
            category="Dictionaries",
        ),
        svg=f"{SET}/figures/training_curves.svg",
    log:
        f"{LOGS}/{{task}}/plot_training_curves.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_training_curves.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        code=code("plot_training_curves"),
    message:
        "Draw the figure training_curves"
    script:
        "../workflow_scripts/plot_training_curves.py"


rule plot_layer_importance:
    input:
        layers=f"{SET}/ranking/layers.parquet",
    output:
        png=report(
            f"{SET}/figures/layer_importance.png",
            caption="../resources/captions/layer_importance.rst",
            category="Scores",
        ),
        svg=f"{SET}/figures/layer_importance.svg",
    log:
        f"{LOGS}/{{task}}/plot_layer_importance.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_layer_importance.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        code=code("plot_layer_importance"),
    message:
        "Draw the figure layer_importance"
    script:
        "../workflow_scripts/plot_layer_importance.py"


rule plot_agreement:
    input:
        nodes=f"{SET}/ranking/nodes.parquet",
        agreement=f"{SET}/ranking/agreement.parquet",
        layers=f"{SET}/ranking/layers.parquet",
    output:
        png=report(
            f"{SET}/figures/agreement.png",
            caption="../resources/captions/agreement.rst",
            category="Scores",
        ),
        svg=f"{SET}/figures/agreement.svg",
    log:
        f"{LOGS}/{{task}}/plot_agreement.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_agreement.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        code=code("plot_agreement"),
    message:
        "Draw the figure agreement"
    script:
        "../workflow_scripts/plot_agreement.py"


rule plot_top_features:
    input:
        nodes=f"{SET}/ranking/nodes.parquet",
        features=FEATURES,
    output:
        png=report(
            f"{SET}/figures/top_features.png",
            caption="../resources/captions/top_features.rst",
            category="Features",
        ),
        svg=f"{SET}/figures/top_features.svg",
    log:
        f"{LOGS}/{{task}}/plot_top_features.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_top_features.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        top=CFG.plots.top_features,
        code=code("plot_top_features"),
    message:
        "Draw the figure top_features"
    script:
        "../workflow_scripts/plot_top_features.py"

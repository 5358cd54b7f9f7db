# Figures about error nodes.


rule plot_error_components:
    input:
        components=f"{SET}/error_nodes/components.parquet",
        pairs=f"{SET}/error_nodes/components.pairs.parquet",
    output:
        png=report(
            f"{SET}/figures/error_components.png",
            caption="../resources/captions/error_components.rst",
            category="Error nodes",
        ),
        svg=f"{SET}/figures/error_components.svg",
    log:
        f"{LOGS}/{{task}}/plot_error_components.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_error_components.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        code=code("plot_error_components"),
    message:
        "Draw the figure error_components"
    script:
        "../workflow_scripts/plot_error_components.py"


rule plot_error_ablation:
    input:
        experiments=f"{SET}/error_nodes/experiments.parquet",
    output:
        png=report(
            f"{SET}/figures/error_ablation.png",
            caption="../resources/captions/error_ablation.rst",
            category="Error nodes",
        ),
        svg=f"{SET}/figures/error_ablation.svg",
    log:
        f"{LOGS}/{{task}}/plot_error_ablation.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_error_ablation.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        method=METHOD,
        code=code("plot_error_ablation"),
    message:
        "Draw the figure error_ablation"
    script:
        "../workflow_scripts/plot_error_ablation.py"


rule plot_error_restoration:
    input:
        experiments=f"{SET}/error_nodes/experiments.parquet",
    output:
        png=report(
            f"{SET}/figures/error_restoration.png",
            caption="../resources/captions/error_restoration.rst",
            category="Error nodes",
        ),
        svg=f"{SET}/figures/error_restoration.svg",
    log:
        f"{LOGS}/{{task}}/plot_error_restoration.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_error_restoration.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        code=code("plot_error_restoration"),
    message:
        "Draw the figure error_restoration"
    script:
        "../workflow_scripts/plot_error_restoration.py"


rule plot_error_heatmap:
    input:
        experiments=f"{SET}/error_nodes/experiments.parquet",
    output:
        png=report(
            f"{SET}/figures/error_heatmap.png",
            caption="../resources/captions/error_heatmap.rst",
            category="Error nodes",
        ),
        svg=f"{SET}/figures/error_heatmap.svg",
    log:
        f"{LOGS}/{{task}}/plot_error_heatmap.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_error_heatmap.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        code=code("plot_error_heatmap"),
    message:
        "Draw the figure error_heatmap"
    script:
        "../workflow_scripts/plot_error_heatmap.py"


rule plot_error_windows:
    input:
        experiments=f"{SET}/error_nodes/experiments.parquet",
    output:
        png=report(
            f"{SET}/figures/error_windows.png",
            caption="../resources/captions/error_windows.rst",
            category="Error nodes",
        ),
        svg=f"{SET}/figures/error_windows.svg",
    log:
        f"{LOGS}/{{task}}/plot_error_windows.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_error_windows.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        method=METHOD,
        code=code("plot_error_windows"),
    message:
        "Draw the figure error_windows"
    script:
        "../workflow_scripts/plot_error_windows.py"


rule plot_error_baselines:
    input:
        experiments=f"{SET}/error_nodes/experiments.parquet",
    output:
        png=report(
            f"{SET}/figures/error_baselines.png",
            caption="../resources/captions/error_baselines.rst",
            category="Error nodes",
        ),
        svg=f"{SET}/figures/error_baselines.svg",
    log:
        f"{LOGS}/{{task}}/plot_error_baselines.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_error_baselines.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        code=code("plot_error_baselines"),
    message:
        "Draw the figure error_baselines"
    script:
        "../workflow_scripts/plot_error_baselines.py"


rule plot_error_decomposition:
    input:
        decomposition=f"{SET}/error_nodes/decomposition.parquet",
    output:
        png=report(
            f"{SET}/figures/error_decomposition.png",
            caption="../resources/captions/error_decomposition.rst",
            category="Error nodes",
        ),
        svg=f"{SET}/figures/error_decomposition.svg",
    log:
        f"{LOGS}/{{task}}/plot_error_decomposition.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_error_decomposition.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        code=code("plot_error_decomposition"),
    message:
        "Draw the figure error_decomposition"
    script:
        "../workflow_scripts/plot_error_decomposition.py"

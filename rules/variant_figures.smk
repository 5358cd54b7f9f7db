# Figures of one variant of a study each.


rule plot_variant_map:
    input:
        features=f"{STUDY}/{{variant}}/features.parquet",
    output:
        png=report(
            f"{STUDY}/figures/{{variant}}/map.png",
            caption="../resources/captions/variant_map.rst",
            category="Study",
            subcategory="{variant}",
        ),
        svg=f"{STUDY}/figures/{{variant}}/map.svg",
    log:
        f"{LOGS}/plot_variant_map.{STUDY_NAME}.{{variant}}.log",
    benchmark:
        f"{ROWS}/plot_variant_map.{STUDY_NAME}.{{variant}}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        variant=lambda wildcards: wildcards.variant,
        site=STUDY_SITE,
        code=code("plot_variant_map"),
    message:
        "Draw the figure map of {wildcards.variant}"
    script:
        "../workflow_scripts/plot_variant_map.py"


rule plot_variant_heatmap:
    input:
        heatmap=f"{STUDY}/{{variant}}/heatmap.parquet",
        features=f"{STUDY}/{{variant}}/features.parquet",
    output:
        png=report(
            f"{STUDY}/figures/{{variant}}/heatmap.png",
            caption="../resources/captions/variant_heatmap.rst",
            category="Study",
            subcategory="{variant}",
        ),
        svg=f"{STUDY}/figures/{{variant}}/heatmap.svg",
    log:
        f"{LOGS}/plot_variant_heatmap.{STUDY_NAME}.{{variant}}.log",
    benchmark:
        f"{ROWS}/plot_variant_heatmap.{STUDY_NAME}.{{variant}}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        variant=lambda wildcards: wildcards.variant,
        site=STUDY_SITE,
        code=code("plot_variant_heatmap"),
    message:
        "Draw the figure heatmap of {wildcards.variant}"
    script:
        "../workflow_scripts/plot_variant_heatmap.py"


rule plot_variant_correlation:
    input:
        correlation=f"{STUDY}/{{variant}}/correlation.parquet",
    output:
        png=report(
            f"{STUDY}/figures/{{variant}}/correlation.png",
            caption="../resources/captions/variant_correlation.rst",
            category="Study",
            subcategory="{variant}",
        ),
        svg=f"{STUDY}/figures/{{variant}}/correlation.svg",
    log:
        f"{LOGS}/plot_variant_correlation.{STUDY_NAME}.{{variant}}.log",
    benchmark:
        f"{ROWS}/plot_variant_correlation.{STUDY_NAME}.{{variant}}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        variant=lambda wildcards: wildcards.variant,
        site=STUDY_SITE,
        code=code("plot_variant_correlation"),
    message:
        "Draw the figure correlation of {wildcards.variant}"
    script:
        "../workflow_scripts/plot_variant_correlation.py"


rule plot_variant_concepts:
    input:
        emergence=f"{STUDY}/{{variant}}/emergence.parquet",
        checkpoints=f"{STUDY}/{{variant}}/checkpoints.parquet",
        features=f"{STUDY}/{{variant}}/features.parquet",
        projection=f"{STUDY}/{{variant}}/projection.parquet",
    output:
        png=report(
            f"{STUDY}/figures/{{variant}}/concepts.png",
            caption="../resources/captions/variant_concepts.rst",
            category="Study",
            subcategory="{variant}",
        ),
        svg=f"{STUDY}/figures/{{variant}}/concepts.svg",
    log:
        f"{LOGS}/plot_variant_concepts.{STUDY_NAME}.{{variant}}.log",
    benchmark:
        f"{ROWS}/plot_variant_concepts.{STUDY_NAME}.{{variant}}.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE,
        variant=lambda wildcards: wildcards.variant,
        site=STUDY_SITE,
        code=code("plot_variant_concepts"),
    message:
        "Draw the figure concepts of {wildcards.variant}"
    script:
        "../workflow_scripts/plot_variant_concepts.py"

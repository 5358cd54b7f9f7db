# Figures of what is done with attribution graphs.


rule plot_graph_supernodes:
    input:
        nodes=f"{GRAPH}/supernodes.parquet",
        edges=f"{GRAPH}/supernode_edges.parquet",
    output:
        png=report(
            f"{GRAPH_FIGURES}/supernodes.png",
            caption="../resources/captions/graph_supernodes.rst",
            category="Attribution graphs",
        ),
        svg=f"{GRAPH_FIGURES}/supernodes.svg",
    log:
        f"{GRAPH_LOGS}/plot_graph_supernodes.log",
    benchmark:
        f"{GRAPH_ROWS}/plot_graph_supernodes.tsv"
    conda:
        ENVIRONMENT
    params:
        style=graph_style,
        max_nodes=CFG.graphs.supernodes.drawn if CFG.graphs else 0,
        code=code("plot_graph_supernodes"),
    message:
        "Draw the supernodes of {wildcards.prompt}"
    script:
        "../workflow_scripts/plot_graph_supernodes.py"


rule plot_graph_interventions:
    input:
        interventions=f"{GRAPH}/interventions.parquet",
        effects=f"{GRAPH}/interventions.effects.parquet",
        agreement=f"{GRAPH}/interventions.agreement.parquet",
    output:
        png=report(
            f"{GRAPH_FIGURES}/interventions.png",
            caption="../resources/captions/graph_interventions.rst",
            category="Attribution graphs",
        ),
        svg=f"{GRAPH_FIGURES}/interventions.svg",
    log:
        f"{GRAPH_LOGS}/plot_graph_interventions.log",
    benchmark:
        f"{GRAPH_ROWS}/plot_graph_interventions.tsv"
    conda:
        ENVIRONMENT
    params:
        style=graph_style,
        code=code("plot_graph_interventions"),
    message:
        "Draw the interventions on {wildcards.prompt}"
    script:
        "../workflow_scripts/plot_graph_interventions.py"


rule plot_graph_heads:
    input:
        heads=f"{GRAPH}/heads.parquet",
    output:
        png=report(
            f"{GRAPH_FIGURES}/heads.png",
            caption="../resources/captions/graph_heads.rst",
            category="Attribution graphs",
        ),
        svg=f"{GRAPH_FIGURES}/heads.svg",
    log:
        f"{GRAPH_LOGS}/plot_graph_heads.log",
    benchmark:
        f"{GRAPH_ROWS}/plot_graph_heads.tsv"
    conda:
        ENVIRONMENT
    params:
        style=graph_style,
        code=code("plot_graph_heads"),
    message:
        "Draw the heads that carry edges of {wildcards.prompt}"
    script:
        "../workflow_scripts/plot_graph_heads.py"


rule plot_graph_motifs:
    input:
        motifs=f"{MOTIFS}/motifs.parquet",
        totals=f"{MOTIFS}/totals.parquet",
    output:
        png=report(
            f"{MOTIFS}/figures/motifs.png",
            caption="../resources/captions/graph_motifs.rst",
            category="Attribution graphs",
        ),
        svg=f"{MOTIFS}/figures/motifs.svg",
    log:
        f"{LOGS}/graphs/{GRAPH_SET}/plot_graph_motifs.log",
    benchmark:
        f"{ROWS}/graphs/{GRAPH_SET}/plot_graph_motifs.tsv"
    conda:
        ENVIRONMENT
    params:
        style=STYLE | {"subject": CFG.model.name},
        code=code("plot_graph_motifs"),
    message:
        "Draw chains of features that recur"
    script:
        "../workflow_scripts/plot_graph_motifs.py"

# Features of attribution graphs described, graphs exported for viewers, and drawn.


include: "graph_figure_paths.smk"


rule describe_graph_features:
    input:
        model=f"{MODEL}/model/manifest.json",
        dictionaries=TRANSCODER_FILES,
        activations=SPAN_ACTIVATIONS,
        corpus=f"{MODEL}/corpus/manifest.json",
        graphs=[f"{GRAPHS}/{prompt}/graph.safetensors" for prompt in PROMPTS],
    output:
        features=f"{GRAPHS}/features.json",
    log:
        f"{LOGS}/graphs/{GRAPH_SET}/describe_graph_features.log",
    benchmark:
        f"{ROWS}/graphs/{GRAPH_SET}/describe_graph_features.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 16000 * attempt,  # the model and all transcoders
        runtime=120,
        gpu=GPU,
    params:
        **PRUNED,
        **(DESCRIBED.model_dump() if DESCRIBED else {}),
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("describe_graph_features"),
    message:
        "Describe the features of attribution graphs"
    script:
        "../workflow_scripts/describe_graph_features.py"


rule export_graph:
    input:
        graph=f"{GRAPH}/graph.safetensors",
        features=GRAPH_FEATURES,
        supernodes=EXPORTED_SUPERNODES,
    output:
        json=f"{GRAPH}/graph.json",
    log:
        f"{GRAPH_LOGS}/export_graph.log",
    benchmark:
        f"{GRAPH_ROWS}/export_graph.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=pruning_memory,
    params:
        **PRUNED,
        **(EXPORTED.model_dump(exclude={"supernodes"}) if EXPORTED else {}),
        slug="{prompt}",
        code=code("export_graph"),
    message:
        "Export the attribution graph of {wildcards.prompt}"
    script:
        "../workflow_scripts/export_graph.py"


rule plot_attribution_graph:
    input:
        graph=f"{GRAPH}/graph.json",
    output:
        png=report(
            f"{GRAPH}/figures/attribution_graph.png",
            caption="../resources/captions/attribution_graph.rst",
            category="Attribution graphs",
        ),
        svg=f"{GRAPH}/figures/attribution_graph.svg",
    log:
        f"{GRAPH_LOGS}/plot_attribution_graph.log",
    benchmark:
        f"{GRAPH_ROWS}/plot_attribution_graph.tsv"
    conda:
        ENVIRONMENT
    params:
        **(CFG.graphs.figure.model_dump() if CFG.graphs else {}),
        style=STYLE,
        code=code("plot_attribution_graph"),
    message:
        "Draw the attribution graph of {wildcards.prompt}"
    script:
        "../workflow_scripts/plot_attribution_graph.py"

# Attribution graphs of single prompts.
include: "graph_paths.smk"


rule build_attribution_graph:
    input:
        model=f"{MODEL}/model/manifest.json",
        dictionaries=TRANSCODER_FILES,
    output:
        graph=f"{GRAPH}/graph.safetensors",
    log:
        f"{GRAPH_LOGS}/build_attribution_graph.log",
    benchmark:
        f"{GRAPH_ROWS}/build_attribution_graph.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **BUILT,
        prompt=graph_prompt,
        model=CFG.model.name,
        dictionaries=GRAPH_SET,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("build_attribution_graph"),
    message:
        "Build the attribution graph of {wildcards.prompt}"
    script:
        "../workflow_scripts/build_attribution_graph.py"


rule prune_graph:
    input:
        graph=f"{GRAPH}/graph.safetensors",
    output:
        nodes=f"{GRAPH}/nodes.parquet",
        edges=f"{GRAPH}/edges.parquet",
        summary=f"{GRAPH}/summary.json",
    log:
        f"{GRAPH_LOGS}/prune_graph.log",
    benchmark:
        f"{GRAPH_ROWS}/prune_graph.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=pruning_memory,
    params:
        **PRUNED,
        code=code("prune_graph"),
    message:
        "Prune the attribution graph of {wildcards.prompt}"
    script:
        "../workflow_scripts/prune_graph.py"


rule virtual_weights:
    input:
        model=f"{MODEL}/model/manifest.json",
        dictionaries=TRANSCODER_FILES,
        graph=f"{GRAPH}/graph.safetensors",
        activations=SPAN_ACTIVATIONS,
        corpus=f"{MODEL}/corpus/manifest.json",
    output:
        weights=f"{GRAPH}/virtual_weights.parquet",
        features=f"{GRAPH}/virtual_features.parquet",
    log:
        f"{GRAPH_LOGS}/virtual_weights.log",
    benchmark:
        f"{GRAPH_ROWS}/virtual_weights.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **(CFG.graphs.virtual.model_dump() if CFG.graphs else {}),
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("virtual_weights"),
    message:
        "Compute virtual weights of the features of {wildcards.prompt}"
    script:
        "../workflow_scripts/virtual_weights.py"


rule graphs:
    input:
        graph_results,

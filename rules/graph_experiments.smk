# What is done with attribution graphs: supernodes, interventions, heads, recurring chains.


include: "graph_experiment_paths.smk"


rule group_features:
    input:
        model=f"{MODEL}/model/manifest.json",
        dictionaries=TRANSCODER_FILES,
        graph=f"{GRAPH}/graph.safetensors",
        activations=SPAN_ACTIVATIONS,
        corpus=f"{MODEL}/corpus/manifest.json",
    output:
        supernodes=f"{GRAPH}/supernodes.json",
        nodes=f"{GRAPH}/supernodes.parquet",
        edges=f"{GRAPH}/supernode_edges.parquet",
    log:
        f"{GRAPH_LOGS}/group_features.log",
    benchmark:
        f"{GRAPH_ROWS}/group_features.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **experiment_keys("supernodes", "by_hand", "prompts", "drawn"),
        **PRUNED,
        by_hand=wanted_supernodes,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("group_features"),
    message:
        "Group the features of {wildcards.prompt}"
    script:
        "../workflow_scripts/group_features.py"


rule intervene_on_graph:
    input:
        model=f"{MODEL}/model/manifest.json",
        dictionaries=TRANSCODER_FILES,
        graph=f"{GRAPH}/graph.safetensors",
        supernodes=f"{GRAPH}/supernodes.json",
    output:
        interventions=f"{GRAPH}/interventions.parquet",
        effects=f"{GRAPH}/interventions.effects.parquet",
        agreement=f"{GRAPH}/interventions.agreement.parquet",
    log:
        f"{GRAPH_LOGS}/intervene_on_graph.log",
    benchmark:
        f"{GRAPH_ROWS}/intervene_on_graph.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **experiment_keys("interventions", "wanted"),
        wanted=wanted_interventions,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("intervene_on_graph"),
    message:
        "Intervene on features of {wildcards.prompt}"
    script:
        "../workflow_scripts/intervene_on_graph.py"


rule attribute_heads:
    input:
        model=f"{MODEL}/model/manifest.json",
        dictionaries=TRANSCODER_FILES,
        graph=f"{GRAPH}/graph.safetensors",
    output:
        heads=f"{GRAPH}/heads.parquet",
    log:
        f"{GRAPH_LOGS}/attribute_heads.log",
    benchmark:
        f"{GRAPH_ROWS}/attribute_heads.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **experiment_keys("heads"),
        **PRUNED,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("attribute_heads"),
    message:
        "Split the edges of {wildcards.prompt} by attention head"
    script:
        "../workflow_scripts/attribute_heads.py"


rule find_motifs:
    input:
        graphs=[f"{GRAPHS}/{prompt}/graph.safetensors" for prompt in PROMPTS],
    output:
        motifs=f"{MOTIFS}/motifs.parquet",
        totals=f"{MOTIFS}/totals.parquet",
    log:
        f"{LOGS}/graphs/{GRAPH_SET}/find_motifs.log",
    benchmark:
        f"{ROWS}/graphs/{GRAPH_SET}/find_motifs.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=60,
    params:
        **experiment_keys("motifs"),
        **PRUNED,
        names=list(PROMPTS),
        code=code("find_motifs"),
    message:
        "Find chains of features that recur across graphs"
    script:
        "../workflow_scripts/find_motifs.py"


rule graph_experiments:
    input:
        graph_experiment_results,


rule graph_motifs:
    input:
        motif_results,

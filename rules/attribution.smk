rule cache_gradients:
    input:
        model=f"{MODEL}/model/manifest.json",
        tokens=f"{TASK}/confident/{{split}}.parquet",
    output:
        manifest=f"{TASK}/gradients/{{split}}.json",
    log:
        f"{LOGS}/cache_gradients.{{split}}.log",
    benchmark:
        f"{ROWS}/cache_gradients.{{split}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        sites=SITES,
        metric=METRIC,
        batch_pairs=CFG.scores.batch_pairs,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("cache_gradients"),
    message:
        "Cache activations and gradients of the {wildcards.split} pairs at every site"
    script:
        "../workflow_scripts/cache_gradients.py"


rule score_nodes:
    input:
        dictionary=f"{TRAINED}/{{site}}.json",
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
    output:
        scores=f"{SET}/scores/{{site}}.parquet",
        positions=f"{SET}/scores/{{site}}.positions.parquet",
        pairs=f"{SET}/scores/{{site}}.pairs.parquet",
    log:
        f"{LOGS}/score_nodes.{{site}}.log",
    benchmark:
        f"{ROWS}/score_nodes.{{site}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=30,
    params:
        site=lambda wildcards: wildcards.site,
        compute=COMPUTE,
        code=code("score_nodes"),
    message:
        "Score the nodes of {wildcards.site}"
    script:
        "../workflow_scripts/score_nodes.py"


rule rank_features:
    input:
        scores=expand(f"{SET}/scores/{{site}}.parquet", site=SITES),
        pairs=expand(f"{SET}/scores/{{site}}.pairs.parquet", site=SITES),
    output:
        nodes=f"{SET}/ranking/nodes.parquet",
        agreement=f"{SET}/ranking/agreement.parquet",
        layers=f"{SET}/ranking/layers.parquet",
    log:
        f"{LOGS}/rank_features.log",
    benchmark:
        f"{ROWS}/rank_features.tsv"
    conda:
        ENVIRONMENT
    params:
        sites=SITES,
        overlap_at=CFG.scores.overlap_at,
        bootstrap=CFG.scores.bootstrap,
        seed=CFG.seed,
        code=code("rank_features"),
    message:
        "Rank nodes and compare the splits"
    script:
        "../workflow_scripts/rank_features.py"


rule score_edges:
    input:
        model=f"{MODEL}/model/manifest.json",
        tokens=f"{TASK}/confident/train.parquet",
        gradients=f"{TASK}/gradients/train.json",
        dictionary_up=f"{TRAINED}/{{up}}.json",
        dictionary_down=f"{TRAINED}/{{down}}.json",
        scores_up=f"{SET}/scores/{{up}}.parquet",
        scores_down=f"{SET}/scores/{{down}}.parquet",
    output:
        edges=f"{SET}/edges/{{up}}__{{down}}.parquet",
    log:
        f"{LOGS}/score_edges.{{up}}.{{down}}.log",
    benchmark:
        f"{ROWS}/score_edges.{{up}}.{{down}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
        gpu=GPU,
    params:
        **CFG.edges.model_dump(),
        up=lambda wildcards: wildcards.up,
        down=lambda wildcards: wildcards.down,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("score_edges"),
    message:
        "Score the edges {wildcards.up} -> {wildcards.down}"
    script:
        "../workflow_scripts/score_edges.py"

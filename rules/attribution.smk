rule cache_gradients:
    input:
        model=f"{MODEL}/model/manifest.json",
        tokens=f"{TASK}/confident/{{split}}.parquet",
    output:
        manifest=f"{TASK}/gradients/{{split}}.json",
    log:
        f"{LOGS}/{{task}}/cache_gradients.{{split}}.log",
    benchmark:
        f"{ROWS}/{{task}}/cache_gradients.{{split}}.tsv"
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
        unpack(method_gradients),
        dictionary=f"{TRAINED}/{{site}}.json",
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
    output:
        scores=f"{SET}/scores/{{method}}/{{site}}.parquet",
        positions=f"{SET}/scores/{{method}}/{{site}}.positions.parquet",
        pairs=f"{SET}/scores/{{method}}/{{site}}.pairs.parquet",
    log:
        f"{LOGS}/{{task}}/score_nodes.{{method}}.{{site}}.log",
    benchmark:
        f"{ROWS}/{{task}}/score_nodes.{{method}}.{{site}}.tsv"
    wildcard_constraints:
        method="atp|ig|relp|decoder_only",
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=30,
        gpu=GPU,
    params:
        site=lambda wildcards: wildcards.site,
        method=lambda wildcards: wildcards.method,
        positions=CFG.scores.positions,
        compute=COMPUTE,
        code=code("score_nodes"),
    message:
        "Score the nodes of {wildcards.site} ({wildcards.method})"
    script:
        "../workflow_scripts/score_nodes.py"


rule rank_features:
    input:
        scores=SCORES,
        pairs=PAIR_SCORES,
    output:
        nodes=f"{SET}/ranking/nodes.parquet",
        agreement=f"{SET}/ranking/agreement.parquet",
        layers=f"{SET}/ranking/layers.parquet",
    log:
        f"{LOGS}/{{task}}/rank_features.log",
    benchmark:
        f"{ROWS}/{{task}}/rank_features.tsv"
    conda:
        ENVIRONMENT
    params:
        sites=SITES,
        ranking=CFG.scores.ranking,
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
        unpack(downstream_end),
        model=f"{MODEL}/model/manifest.json",
        tokens=f"{TASK}/confident/train.parquet",
        gradients=f"{TASK}/gradients/train.json",
        dictionaries_up=lambda wildcards: [
            f"{TRAINED}/{site}.json" for site in NEIGHBOURS[wildcards.down]
        ],
        scores_up=lambda wildcards: [
            f"{SET}/scores/{METHOD}/{site}.parquet".format(task=wildcards.task)
            for site in NEIGHBOURS[wildcards.down]
        ],
    output:
        edges=f"{SET}/edges/{{down}}.parquet",
        draws=f"{SET}/edges/{{down}}.draws.parquet",
    log:
        f"{LOGS}/{{task}}/score_edges.{{down}}.log",
    benchmark:
        f"{ROWS}/{{task}}/score_edges.{{down}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
        gpu=GPU,
    params:
        **CFG.edges.model_dump(),
        down=lambda wildcards: wildcards.down,
        ups=lambda wildcards: NEIGHBOURS[wildcards.down],
        sites=lambda wildcards: edge_sites(wildcards.down),
        positions=CFG.scores.positions,
        ranking=CFG.scores.ranking,
        metric=METRIC,
        seed=CFG.seed,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("score_edges"),
    message:
        "Score the edges into {wildcards.down}"
    script:
        "../workflow_scripts/score_edges.py"

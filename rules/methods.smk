# Node methods other than the plain gradient, and how they compare.


rule cache_method_gradients:
    input:
        model=f"{MODEL}/model/manifest.json",
        tokens=f"{TASK}/confident/{{split}}.parquet",
        gradients=f"{TASK}/gradients/{{split}}.json",
    output:
        manifest=f"{TASK}/gradients.{{method}}/{{split}}.json",
    log:
        f"{LOGS}/{{task}}/cache_method_gradients.{{method}}.{{split}}.log",
    benchmark:
        f"{ROWS}/{{task}}/cache_method_gradients.{{method}}.{{split}}.tsv"
    wildcard_constraints:
        method="ig|relp",
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        method=lambda wildcards: wildcards.method,
        steps=lambda wildcards: (CFG.scores.steps if wildcards.method == "ig" else None),
        path=lambda wildcards: CFG.scores.path if wildcards.method == "ig" else None,
        sites=SITES,
        metric=METRIC,
        batch_pairs=CFG.scores.batch_pairs,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("cache_method_gradients"),
    message:
        "Cache the {wildcards.method} gradients of the {wildcards.split} pairs"
    script:
        "../workflow_scripts/cache_method_gradients.py"


rule patch_nodes:
    input:
        model=f"{MODEL}/model/manifest.json",
        dictionary=f"{TRAINED}/{{site}}.json",
        scores=f"{SET}/scores/atp/{{site}}.parquet",
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
    output:
        scores=f"{SET}/scores/exact/{{site}}.parquet",
        positions=f"{SET}/scores/exact/{{site}}.positions.parquet",
        pairs=f"{SET}/scores/exact/{{site}}.pairs.parquet",
    log:
        f"{LOGS}/{{task}}/patch_nodes.{{site}}.log",
    benchmark:
        f"{ROWS}/{{task}}/patch_nodes.{{site}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        site=lambda wildcards: wildcards.site,
        metric=METRIC,
        positions=CFG.scores.positions,
        budget=CFG.scores.budget,
        batch_rows=CFG.evaluation.batch_rows,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("patch_nodes"),
    message:
        "Patch the nodes of {wildcards.site} one by one"
    script:
        "../workflow_scripts/patch_nodes.py"


rule score_in_loop:
    input:
        model=f"{MODEL}/model/manifest.json",
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
    output:
        **in_loop_tables(),
    log:
        f"{LOGS}/{{task}}/score_in_loop.log",
    benchmark:
        f"{ROWS}/{{task}}/score_in_loop.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 16000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        sites=SITES,
        metric=METRIC,
        positions=CFG.scores.positions,
        batch_pairs=CFG.scores.batch_pairs,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("score_in_loop"),
    message:
        "Score the nodes of every site with the dictionaries inside the model"
    script:
        "../workflow_scripts/score_in_loop.py"


rule compare_methods:
    input:
        **method_tables(),
    output:
        agreement=f"{SET}/methods/agreement.parquet",
        nodes=f"{SET}/methods/nodes.parquet",
    log:
        f"{LOGS}/{{task}}/compare_methods.log",
    benchmark:
        f"{ROWS}/{{task}}/compare_methods.tsv"
    conda:
        ENVIRONMENT
    params:
        sites=SITES,
        methods=CFG.scores.compare,
        reference=CFG.scores.compare[-1],
        ranking=CFG.scores.ranking,
        overlap_at=CFG.scores.overlap_at,
        bootstrap=CFG.scores.bootstrap,
        seed=CFG.seed,
        code=code("compare_methods"),
    message:
        "Compare node methods"
    script:
        "../workflow_scripts/compare_methods.py"


rule plot_methods:
    input:
        agreement=f"{SET}/methods/agreement.parquet",
        nodes=f"{SET}/methods/nodes.parquet",
    output:
        png=report(
            f"{SET}/figures/methods.png",
            caption="../resources/captions/methods.rst",
            category="Scores",
        ),
        svg=f"{SET}/figures/methods.svg",
    log:
        f"{LOGS}/{{task}}/plot_methods.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_methods.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        code=code("plot_methods"),
    message:
        "Draw the figure methods"
    script:
        "../workflow_scripts/plot_methods.py"


rule methods:
    input:
        with_features("methods", lambda: methods_compared()),

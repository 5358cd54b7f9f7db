rule describe_features:
    input:
        model=f"{MODEL}/model/manifest.json",
        dictionary=f"{TRAINED}/{{site}}.json",
        activations=f"{MODEL}/activations/manifest.json",
        corpus=f"{MODEL}/corpus/manifest.json",
        nodes=f"{SET}/ranking/nodes.parquet",
        tokens=f"{TASK}/confident/train.parquet",
        gradients=f"{TASK}/gradients/train.json",
    output:
        features=f"{SET}/features/{{site}}.json",
    log:
        f"{LOGS}/{{task}}/describe_features.{{site}}.log",
    benchmark:
        f"{ROWS}/{{task}}/describe_features.{{site}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **CFG.features.model_dump(exclude={"top"}),
        top=max(CFG.features.top, CFG.edges.pool),
        site=lambda wildcards: wildcards.site,
        compute=COMPUTE,
        code=code("describe_features"),
    message:
        "Find what the top features of {wildcards.site} fire on"
    script:
        "../workflow_scripts/describe_features.py"

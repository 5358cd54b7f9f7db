rule cache_means:
    input:
        dictionary=f"{TRAINED}/{{site}}.json",
        tokens_train=f"{TASK}/confident/train.parquet",
        gradients_train=f"{TASK}/gradients/train.json",
    output:
        manifest=f"{SET}/means/{{site}}.json",
    log:
        f"{LOGS}/{{task}}/cache_means.{{site}}.log",
    benchmark:
        f"{ROWS}/{{task}}/cache_means.{{site}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=30,
        gpu=GPU,
    params:
        site=lambda wildcards: wildcards.site,
        compute=COMPUTE,
        code=code("cache_means"),
    message:
        "Keep the means of {wildcards.site}"
    script:
        "../workflow_scripts/cache_means.py"

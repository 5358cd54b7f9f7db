rule cache_means:
    input:
        dictionary=f"{TRAINED}/{{site}}.json",
        tokens=f"{TASK}/confident/{{split}}.parquet",
        gradients=f"{TASK}/gradients/{{split}}.json",
    output:
        manifest=f"{SET}/means/{{split}}/{{site}}.json",
    log:
        f"{LOGS}/{{task}}/cache_means.{{split}}.{{site}}.log",
    benchmark:
        f"{ROWS}/{{task}}/cache_means.{{split}}.{{site}}.tsv"
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
        "Keep the means of {wildcards.site} ({wildcards.split})"
    script:
        "../workflow_scripts/cache_means.py"

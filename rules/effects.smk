# What the circuit does on single prompts.


rule measure_effects:
    input:
        model=f"{MODEL}/model/manifest.json",
        circuit=f"{SET}/circuit.json",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
        means=MEANS,
    output:
        effects=f"{SET}/effects.parquet",
        response=f"{SET}/effects.response.parquet",
    log:
        f"{LOGS}/{{task}}/measure_effects.log",
    benchmark:
        f"{ROWS}/{{task}}/measure_effects.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=60,
        gpu=GPU,
    params:
        **CFG.effects.model_dump(),
        ablation=CFG.evaluation.ablation,
        seed=CFG.evaluation.seed,
        batch_rows=CFG.evaluation.batch_rows,
        sites=SITES,
        metric=METRIC,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("measure_effects"),
    message:
        "Measure effects on single prompts"
    script:
        "../workflow_scripts/measure_effects.py"


rule plot_effects:
    input:
        effects=f"{SET}/effects.parquet",
        response=f"{SET}/effects.response.parquet",
    output:
        png=report(
            f"{SET}/figures/effects.png",
            caption="../resources/captions/effects.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/effects.svg",
    log:
        f"{LOGS}/{{task}}/plot_effects.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_effects.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        code=code("plot_effects"),
    message:
        "Draw the figure effects"
    script:
        "../workflow_scripts/plot_effects.py"


rule effects:
    input:
        with_features("effects", lambda: of_tasks(f"{SET}/figures/effects.png")),

rule assemble_circuit:
    input:
        nodes=f"{SET}/ranking/nodes.parquet",
        edges=[f"{SET}/edges/{up}__{down}.parquet" for up, down in SITE_PAIRS],
    output:
        circuit=f"{SET}/circuit.json",
        graphml=f"{SET}/circuit.graphml",
    log:
        f"{LOGS}/assemble_circuit.log",
    benchmark:
        f"{ROWS}/assemble_circuit.tsv"
    conda:
        ENVIRONMENT
    params:
        sites=SITES,
        model=CFG.model.name,
        task=CFG.task.name,
        nodes=CFG.circuit.nodes.model_dump(exclude_none=True),
        edges=CFG.circuit.edges.model_dump(exclude_none=True),
        pool=CFG.edges.pool,
        code=code("assemble_circuit"),
    message:
        "Assemble the circuit"
    script:
        "../workflow_scripts/assemble_circuit.py"


rule evaluate_circuit:
    input:
        model=f"{MODEL}/model/manifest.json",
        circuit=f"{SET}/circuit.json",
        nodes=f"{SET}/ranking/nodes.parquet",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
    output:
        faithfulness=f"{SET}/faithfulness.parquet",
    log:
        f"{LOGS}/evaluate_circuit.log",
    benchmark:
        f"{ROWS}/evaluate_circuit.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
        gpu=GPU,
    params:
        **CFG.evaluation.model_dump(),
        sites=SITES,
        metric=METRIC,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("evaluate_circuit"),
    message:
        "Measure faithfulness and completeness"
    script:
        "../workflow_scripts/evaluate_circuit.py"

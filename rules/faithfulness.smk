# How faithful circuits are under other conditions, along their edges, and on single prompts.


rule evaluate_conditions:
    input:
        **EVALUATED,
        # After the main condition, whose values it takes over.
        main=f"{SET}/faithfulness.parquet",
    output:
        faithfulness=f"{SET}/conditions.parquet",
        prompts=f"{SET}/conditions.prompts.parquet",
        areas=f"{SET}/conditions.areas.parquet",
    log:
        f"{LOGS}/{{task}}/evaluate_conditions.log",
    benchmark:
        f"{ROWS}/{{task}}/evaluate_conditions.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        **CFG.evaluation.model_dump(exclude={"edges", "confidence"}),
        sites=SITES,
        ranking=CFG.scores.ranking,
        positions=CFG.scores.positions,
        metric=METRIC,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("evaluate_circuit"),
    message:
        "Measure faithfulness under further conditions"
    script:
        "../workflow_scripts/evaluate_circuit.py"


rule evaluate_edges:
    input:
        model=f"{MODEL}/model/manifest.json",
        circuit=f"{SET}/circuit.json",
        edges=EDGES,
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
        means=MEANS,
    output:
        edge_faithfulness=f"{SET}/edge_faithfulness.parquet",
    log:
        f"{LOGS}/{{task}}/evaluate_edges.log",
    benchmark:
        f"{ROWS}/{{task}}/evaluate_edges.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=240,
        gpu=GPU,
    params:
        **CFG.evaluation.model_dump(
            include={"ablation", "aggregate", "bootstrap", "seed", "batch_rows"}
        ),
        **CFG.evaluation.edges.model_dump(),
        sites=SITES,
        metric=METRIC,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("evaluate_edges"),
    message:
        "Measure the faithfulness of the circuit's strongest edges"
    script:
        "../workflow_scripts/evaluate_edges.py"


rule compose_circuits:
    input:
        nodes=f"{SET}/ranking/nodes.parquet",
        circuit=f"{SET}/circuit.json",
    output:
        composition=f"{SET}/composition.parquet",
    log:
        f"{LOGS}/{{task}}/compose_circuits.log",
    benchmark:
        f"{ROWS}/{{task}}/compose_circuits.tsv"
    conda:
        ENVIRONMENT
    params:
        **CFG.evaluation.model_dump(include={"counts", "thresholds", "shares"}),
        sites=SITES,
        ranking=CFG.scores.ranking,
        code=code("compose_circuits"),
    message:
        "Count what circuits are made of"
    script:
        "../workflow_scripts/compose_circuits.py"


rule count_confident:
    input:
        prompts=f"{TASK}/confident/prompts.parquet",
    output:
        confidence=f"{TASK}/confidence.parquet",
    log:
        f"{LOGS}/{{task}}/count_confident.log",
    benchmark:
        f"{ROWS}/{{task}}/count_confident.tsv"
    conda:
        ENVIRONMENT
    params:
        **CFG.evaluation.confidence.model_dump(),
        code=code("count_confident"),
    message:
        "Count the prompts by confidence"
    script:
        "../workflow_scripts/count_confident.py"


# Contexts of text have no file of pairs to take the confident ones from.
if CFG.task.pairs.kind != "text":

    rule export_confident:
        input:
            pairs_train=f"{BASE}/pairs/train.jsonl",
            pairs_test=f"{BASE}/pairs/test.jsonl",
            tokens_train=f"{TASK}/confident/train.parquet",
            tokens_test=f"{TASK}/confident/test.parquet",
        output:
            train=f"{TASK}/confident/train.jsonl",
            test=f"{TASK}/confident/test.jsonl",
            provenance=f"{TASK}/confident/provenance.json",
        log:
            f"{LOGS}/{{task}}/export_confident.log",
        benchmark:
            f"{ROWS}/{{task}}/export_confident.tsv"
        conda:
            ENVIRONMENT
        params:
            code=code("export_confident"),
        message:
            "Write the confident pairs"
        script:
            "../workflow_scripts/export_confident.py"


OF_FAITHFULNESS = [
    f"{SET}/figures/{plot}.{kind}"
    for plot in (
        "faithfulness",
        "faithfulness_conditions",
        "composition",
        "outliers",
        "confidence",
        "edge_faithfulness",
    )
    for kind in ("png", "svg")
]
if CFG.task.pairs.kind != "text":
    OF_FAITHFULNESS += [f"{TASK}/confident/{split}.jsonl" for split in SPLITS]


rule faithfulness:
    input:
        with_features("faithfulness", lambda: of_tasks(OF_FAITHFULNESS)),

# Means of every site, which ablated nodes become; rule cache_means makes them.
MEANS = [f"{SET}/means/{CFG.evaluation.means}/{site}.json" for site in SITES]


rule assemble_circuit:
    input:
        nodes=f"{SET}/ranking/nodes.parquet",
        edges=EDGES,
        search=searched(),
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
    output:
        circuit=f"{SET}/circuit.json",
        graphml=f"{SET}/circuit.graphml",
        dot=f"{SET}/circuit.dot",
    log:
        f"{LOGS}/{{task}}/assemble_circuit.log",
    benchmark:
        f"{ROWS}/{{task}}/assemble_circuit.tsv"
    conda:
        ENVIRONMENT
    params:
        **CHOSEN,
        sites=SITES,
        model=CFG.model.name,
        task=lambda wildcards: wildcards.task,
        prune=CFG.circuit.prune,
        max_nodes=CFG.circuit.max_nodes,
        code=code("assemble_circuit"),
    message:
        "Assemble the circuit"
    script:
        "../workflow_scripts/assemble_circuit.py"


# Conditions beside the main one are measured by rule evaluate_conditions.
OF_CONDITIONS = {"further_ablations", "starts", "errors", "neurons"}
EVALUATED = {
    "model": f"{MODEL}/model/manifest.json",
    "circuit": f"{SET}/circuit.json",
    "nodes": f"{SET}/ranking/nodes.parquet",
    "tokens_train": f"{TASK}/confident/train.parquet",
    "tokens_test": f"{TASK}/confident/test.parquet",
    "gradients_train": f"{TASK}/gradients/train.json",
    "gradients_test": f"{TASK}/gradients/test.json",
    "dictionaries": expand(f"{TRAINED}/{{site}}.json", site=SITES),
    "means": MEANS,
}


rule evaluate_circuit:
    input:
        **EVALUATED,
    output:
        faithfulness=f"{SET}/faithfulness.parquet",
        prompts=f"{SET}/faithfulness.prompts.parquet",
        areas=f"{SET}/faithfulness.areas.parquet",
    log:
        f"{LOGS}/{{task}}/evaluate_circuit.log",
    benchmark:
        f"{ROWS}/{{task}}/evaluate_circuit.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
        gpu=GPU,
    params:
        **CFG.evaluation.model_dump(exclude={"edges", "confidence", *OF_CONDITIONS}),
        sites=SITES,
        ranking=CFG.scores.ranking,
        positions=CFG.scores.positions,
        metric=METRIC,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("evaluate_circuit"),
    message:
        "Measure faithfulness and completeness"
    script:
        "../workflow_scripts/evaluate_circuit.py"


rule search_circuit:
    input:
        model=f"{MODEL}/model/manifest.json",
        nodes=f"{SET}/ranking/nodes.parquet",
        tokens_train=f"{TASK}/confident/train.parquet",
        gradients_train=f"{TASK}/gradients/train.json",
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
        means=MEANS,
    output:
        search=f"{SET}/search.parquet",
    log:
        f"{LOGS}/{{task}}/search_circuit.log",
    benchmark:
        f"{ROWS}/{{task}}/search_circuit.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
        gpu=GPU,
    params:
        **CFG.evaluation.model_dump(
            include={
                "pairs",
                "ablation",
                "aggregate",
                "bootstrap",
                "seed",
                "batch_rows",
            }
        ),
        faithfulness=CFG.circuit.nodes.faithfulness,
        pool=CFG.edges.pool,
        sites=SITES,
        ranking=CFG.scores.ranking,
        metric=METRIC,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("search_circuit"),
    message:
        "Search the smallest circuit that is faithful enough"
    script:
        "../workflow_scripts/search_circuit.py"


rule circuit_stability:
    input:
        circuit=f"{SET}/circuit.json",
        pairs=PAIR_SCORES,
        edges=EDGES,
        draws=EDGE_DRAWS,
    output:
        nodes=f"{SET}/stability.nodes.parquet",
        edges=f"{SET}/stability.edges.parquet",
    log:
        f"{LOGS}/{{task}}/circuit_stability.log",
    benchmark:
        f"{ROWS}/{{task}}/circuit_stability.tsv"
    conda:
        ENVIRONMENT
    params:
        **CHOSEN,
        sites=SITES,
        resamples=CFG.circuit.stability,
        seed=CFG.seed,
        code=code("circuit_stability"),
    message:
        "Measure how stable the circuit is"
    script:
        "../workflow_scripts/circuit_stability.py"

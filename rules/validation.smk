# Scores and circuits against the truth.

OF_VALIDATION = [
    f"{SET}/{file}"
    for file in (
        "validation.parquet",
        "audit.parquet",
        "figures/validation.png",
        "figures/audit.png",
    )
]
VALIDATED = [
    method
    for method in dict.fromkeys([METHOD, *CFG.scores.compare])
    if method not in ("exact", "decoder_only")
]
# Score tables of every method that is validated, and of exact patching.
VALIDATED_TABLES = {
    f"{name}_{method}": [
        f"{SET}/scores/{method}/{site}{ending}.parquet" for site in SITES
    ]
    for method in (*VALIDATED, "exact")
    for name, ending in (("scores", ""), ("pairs", ".pairs"))
}


rule validate_scores:
    input:
        **VALIDATED_TABLES,
        tokens=f"{TASK}/confident/train.parquet",
        gradients=f"{TASK}/gradients/train.json",
    output:
        validation=f"{SET}/validation.parquet",
        nodes=f"{SET}/validation.nodes.parquet",
    log:
        f"{LOGS}/{{task}}/validate_scores.log",
    benchmark:
        f"{ROWS}/{{task}}/validate_scores.tsv"
    conda:
        ENVIRONMENT
    params:
        sites=SITES,
        methods=VALIDATED,
        aggregate=CFG.evaluation.aggregate,
        bootstrap=CFG.scores.bootstrap,
        seed=CFG.seed,
        code=code("validate_scores"),
    message:
        "Hold scores against true patching effects"
    script:
        "../workflow_scripts/validate_scores.py"


rule audit_circuit:
    input:
        model=f"{MODEL}/model/manifest.json",
        circuit=f"{SET}/circuit.json",
        tokens=f"{TASK}/confident/test.parquet",
        gradients=f"{TASK}/gradients/test.json",
        dictionaries=expand(f"{TRAINED}/{{site}}.json", site=SITES),
        pairs=[f"{SET}/scores/atp/{site}.pairs.parquet" for site in SITES],
        edges=EDGES,
    output:
        summary=f"{SET}/audit.parquet",
        nodes=f"{SET}/audit.nodes.parquet",
        edges=f"{SET}/audit.edges.parquet",
    log:
        f"{LOGS}/{{task}}/audit_circuit.log",
    benchmark:
        f"{ROWS}/{{task}}/audit_circuit.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
        gpu=GPU,
    params:
        **CFG.audit.model_dump(),
        sites=SITES,
        downs=list(NEIGHBOURS),
        positions=CFG.scores.positions,
        metric=METRIC,
        batch_rows=CFG.evaluation.batch_rows,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        code=code("audit_circuit"),
    message:
        "Audit the circuit: patch nodes and edges in and out of it"
    script:
        "../workflow_scripts/audit_circuit.py"


rule plot_validation:
    input:
        validation=f"{SET}/validation.parquet",
        nodes=f"{SET}/validation.nodes.parquet",
    output:
        png=report(
            f"{SET}/figures/validation.png",
            caption="../resources/captions/validation.rst",
            category="Scores",
        ),
        svg=f"{SET}/figures/validation.svg",
    log:
        f"{LOGS}/{{task}}/plot_validation.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_validation.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        method=METHOD,
        code=code("plot_validation"),
    message:
        "Draw the figure validation"
    script:
        "../workflow_scripts/plot_validation.py"


rule plot_audit:
    input:
        summary=f"{SET}/audit.parquet",
        nodes=f"{SET}/audit.nodes.parquet",
        edges=f"{SET}/audit.edges.parquet",
    output:
        png=report(
            f"{SET}/figures/audit.png",
            caption="../resources/captions/audit.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/audit.svg",
    log:
        f"{LOGS}/{{task}}/plot_audit.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_audit.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        code=code("plot_audit"),
    message:
        "Draw the figure audit"
    script:
        "../workflow_scripts/plot_audit.py"


rule validation:
    input:
        with_features("validation", lambda: of_tasks(OF_VALIDATION)),

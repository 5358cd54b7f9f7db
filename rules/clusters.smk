if CLUSTERS:

    rule cluster_contexts:
        input:
            tokens_train=f"{BASE}/confident/train.parquet",
            tokens_test=f"{BASE}/confident/test.parquet",
            prompts=f"{BASE}/confident/prompts.parquet",
            gradients_train=f"{BASE}/gradients/train.json",
            gradients_test=f"{BASE}/gradients/test.json",
        output:
            **cluster_tables(),
            clusters=f"{BASE}/clusters.parquet",
        log:
            f"{LOGS}/cluster_contexts.log",
        benchmark:
            f"{ROWS}/cluster_contexts.tsv"
        conda:
            ENVIRONMENT
        params:
            **CFG.task.clusters.model_dump(exclude={"count"}),
            clusters=CFG.task.clusters.count,
            code=code("cluster_contexts"),
        message:
            "Group contexts that are alike inside the model"
        script:
            "../workflow_scripts/cluster_contexts.py"

    rule plot_clusters:
        input:
            clusters=f"{BASE}/clusters.parquet",
        output:
            png=report(
                f"{BASE}/figures/clusters.png",
                caption="../resources/captions/clusters.rst",
                category="Task",
            ),
            svg=f"{BASE}/figures/clusters.svg",
        log:
            f"{LOGS}/plot_clusters.log",
        benchmark:
            f"{ROWS}/plot_clusters.tsv"
        conda:
            ENVIRONMENT
        params:
            style=STYLE | {"subject": f"{CFG.model.name} · {CFG.task.name}"},
            code=code("plot_clusters"),
        message:
            "Draw the figure clusters"
        script:
            "../workflow_scripts/plot_clusters.py"

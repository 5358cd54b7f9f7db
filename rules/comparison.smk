# Contenders at equal node budgets.


include: "comparison_paths.smk"


wildcard_constraints:
    contender="|".join(map(re.escape, CONTENDERS)),
    compared="|".join(map(re.escape, COMPARED_SETS)) or "none",


use rule score_nodes as score_contender with:
    input:
        unpack(method_gradients),
        dictionary=f"{DICTIONARIES}/{{compared}}/{{site}}.json",
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
    output:
        scores=f"{TASK}/{{compared}}/scores/{{method}}/{{site}}.parquet",
        positions=f"{TASK}/{{compared}}/scores/{{method}}/{{site}}.positions.parquet",
        pairs=f"{TASK}/{{compared}}/scores/{{method}}/{{site}}.pairs.parquet",
    log:
        f"{LOGS}/{{task}}/{{compared}}/score_contender.{{method}}.{{site}}.log",
    benchmark:
        f"{ROWS}/{{task}}/{{compared}}/score_contender.{{method}}.{{site}}.tsv"
    message:
        "Score the nodes of {wildcards.site} with {wildcards.compared} ({wildcards.method})"


use rule rank_features as rank_contender with:
    input:
        scores=contender_scores(""),
        pairs=contender_scores(".pairs"),
    output:
        nodes=f"{COMPARE}/{{contender}}/nodes.parquet",
        agreement=f"{COMPARE}/{{contender}}/agreement.parquet",
        layers=f"{COMPARE}/{{contender}}/layers.parquet",
    log:
        f"{LOGS}/{{task}}/compare/rank_contender.{{contender}}.log",
    benchmark:
        f"{ROWS}/{{task}}/compare/rank_contender.{{contender}}.tsv"
    message:
        "Rank the nodes of {wildcards.contender}"


rule evaluate_budget:
    input:
        model=f"{MODEL}/model/manifest.json",
        nodes=f"{COMPARE}/{{contender}}/nodes.parquet",
        layers=f"{COMPARE}/{{contender}}/layers.parquet",
        tokens_train=f"{TASK}/confident/train.parquet",
        tokens_test=f"{TASK}/confident/test.parquet",
        gradients_train=f"{TASK}/gradients/train.json",
        gradients_test=f"{TASK}/gradients/test.json",
        dictionaries=contender_dictionaries,
    output:
        values=f"{COMPARE}/{{contender}}/values.parquet",
        circuit=f"{COMPARE}/{{contender}}/circuit.json",
    log:
        f"{LOGS}/{{task}}/compare/evaluate_budget.{{contender}}.log",
    benchmark:
        f"{ROWS}/{{task}}/compare/evaluate_budget.{{contender}}.tsv"
    conda:
        ENVIRONMENT
    threads: CFG.compute.threads
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
        runtime=120,
        gpu=GPU,
    params:
        contender=lambda wildcards: wildcards.contender,
        method=lambda wildcards: CONTENDERS[wildcards.contender][1],
        counts=CFG.comparison.counts,
        shares=CFG.comparison.shares,
        size=CFG.comparison.size,
        ablation=CFG.evaluation.ablation,
        means=CFG.evaluation.means,
        pairs=CFG.evaluation.pairs,
        batch_rows=CFG.evaluation.batch_rows,
        seed=CFG.evaluation.seed,
        ranking=CFG.scores.ranking,
        sites=SITES,
        metric=METRIC,
        dtype=CFG.model.dtype,
        compute=COMPUTE,
        model_name=CFG.model.name,
        task=lambda wildcards: wildcards.task,
        code=code("evaluate_budget"),
    message:
        "Evaluate {wildcards.contender} at every budget"
    script:
        "../workflow_scripts/evaluate_budget.py"


rule compare_budgets:
    input:
        values=other_contenders("values.parquet"),
        circuits=other_contenders("circuit.json"),
        dictionaries=[
            f"{DICTIONARIES}/{name}/{site}.json"
            for name in dict.fromkeys(name for name, _ in CONTENDERS.values())
            for site in SITES
        ],
    output:
        **{name: f"{COMPARE}/{name}.parquet" for name in BUDGET_TABLES},
    log:
        f"{LOGS}/{{task}}/compare/compare_budgets.log",
    benchmark:
        f"{ROWS}/{{task}}/compare/compare_budgets.tsv"
    conda:
        ENVIRONMENT
    params:
        names=[*CONTENDERS, *CFG.comparison.others],
        sites=SITES,
        aggregate=CFG.evaluation.aggregate,
        bootstrap=CFG.evaluation.bootstrap,
        seed=CFG.evaluation.seed,
        least_cosine=CFG.comparison.least_cosine,
        code=code("compare_budgets"),
    message:
        "Compare contenders at equal budgets"
    script:
        "../workflow_scripts/compare_budgets.py"


rule plot_budgets:
    input:
        **{name: f"{COMPARE}/{name}.parquet" for name in BUDGET_TABLES},
    output:
        png=report(
            f"{COMPARE}/figures/budgets.png",
            caption="../resources/captions/budgets.rst",
            category="Comparison",
        ),
        svg=f"{COMPARE}/figures/budgets.svg",
    log:
        f"{LOGS}/{{task}}/compare/plot_budgets.log",
    benchmark:
        f"{ROWS}/{{task}}/compare/plot_budgets.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        ablation=CFG.evaluation.ablation,
        code=code("plot_budgets"),
    message:
        "Draw the figure budgets"
    script:
        "../workflow_scripts/plot_budgets.py"


rule compare:
    input:
        with_features("compare", lambda: of_tasks(OF_COMPARISON)),

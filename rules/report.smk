rule build_report:
    input:
        prompts=f"{TASK}/confident/prompts.parquet",
        dropped=f"{TASK}/tokens/dropped.parquet",
        quality=expand(f"{TRAINED}/{{site}}.quality.parquet", site=SITES),
        layers=f"{SET}/ranking/layers.parquet",
        agreement=f"{SET}/ranking/agreement.parquet",
        nodes=f"{SET}/ranking/nodes.parquet",
        features=expand(f"{SET}/features/{{site}}.json", site=SITES),
        circuit=f"{SET}/circuit.json",
        faithfulness=f"{SET}/faithfulness.parquet",
        figures=expand(f"{SET}/figures/{{plot}}.svg", plot=PLOTS),
        captions=expand("resources/captions/{plot}.rst", plot=PLOTS),
        templates=expand("resources/report/page.{part}", part=["html.j2", "css", "js"]),
    output:
        page=f"{SET}/report.html",
    log:
        f"{LOGS}/build_report.log",
    benchmark:
        f"{ROWS}/build_report.tsv"
    conda:
        ENVIRONMENT
    params:
        plots=PLOTS,
        config=CFG.model_dump(exclude={"recompute", "tracking", "study"}),
        code=code("build_report"),
    message:
        "Build the page"
    script:
        "../workflow_scripts/build_report.py"

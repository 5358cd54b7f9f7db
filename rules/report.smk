rule build_report:
    input:
        prompts=f"{TASK}/confident/prompts.parquet",
        dropped=f"{BASE}/tokens/dropped.parquet",
        quality=expand(f"{TRAINED}/{{site}}.quality.parquet", site=SITES),
        layers=f"{SET}/ranking/layers.parquet",
        agreement=f"{SET}/ranking/agreement.parquet",
        nodes=f"{SET}/ranking/nodes.parquet",
        features=FEATURES,
        circuit=f"{SET}/circuit.json",
        audit=f"{SET}/audit.parquet",
        faithfulness=f"{SET}/faithfulness.parquet",
        figures=[f"{file}.svg" for file in PAGE_PLOTS.values()],
        captions=expand("resources/captions/{plot}.rst", plot=PAGE_PLOTS),
        templates=expand("resources/report/page.{part}", part=["html.j2", "css", "js"]),
    output:
        page=f"{SET}/report.html",
    log:
        f"{LOGS}/{{task}}/build_report.log",
    benchmark:
        f"{ROWS}/{{task}}/build_report.tsv"
    conda:
        ENVIRONMENT
    params:
        plots=list(PAGE_PLOTS),
        config=CFG.model_dump(exclude={"recompute", "tracking", "study"}),
        code=code("build_report"),
    message:
        "Build the page"
    script:
        "../workflow_scripts/build_report.py"

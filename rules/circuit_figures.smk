rule plot_faithfulness:
    input:
        faithfulness=f"{SET}/faithfulness.parquet",
    output:
        png=report(
            f"{SET}/figures/faithfulness.png",
            caption="../resources/captions/faithfulness.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/faithfulness.svg",
    log:
        f"{LOGS}/{{task}}/plot_faithfulness.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_faithfulness.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        code=code("plot_faithfulness"),
    message:
        "Draw the figure faithfulness"
    script:
        "../workflow_scripts/plot_faithfulness.py"


rule plot_circuit:
    input:
        circuit=f"{SET}/circuit.json",
        audit=f"{SET}/audit.parquet",
        features=FEATURES,
    output:
        png=report(
            f"{SET}/figures/circuit.png",
            caption="../resources/captions/circuit.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/circuit.svg",
    log:
        f"{LOGS}/{{task}}/plot_circuit.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_circuit.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        max_edges=CFG.plots.max_edges,
        code=code("plot_circuit"),
    message:
        "Draw the figure circuit"
    script:
        "../workflow_scripts/plot_circuit.py"


rule plot_circuit_positions:
    input:
        circuit=f"{SET}/circuit.json",
        audit=f"{SET}/audit.parquet",
        features=FEATURES,
        tokens=f"{TASK}/confident/train.parquet",
        positions=POSITION_SCORES,
    output:
        png=report(
            f"{SET}/figures/circuit_positions.png",
            caption="../resources/captions/circuit_positions.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/circuit_positions.svg",
    log:
        f"{LOGS}/{{task}}/plot_circuit_positions.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_circuit_positions.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        case=CFG.plots.case,
        max_nodes=CFG.plots.max_nodes,
        max_edges=CFG.plots.max_edges,
        share=CFG.plots.position_share,
        code=code("plot_circuit_positions"),
    message:
        "Draw the figure circuit_positions"
    script:
        "../workflow_scripts/plot_circuit_positions.py"


rule plot_stability:
    input:
        nodes=f"{SET}/stability.nodes.parquet",
        edges=f"{SET}/stability.edges.parquet",
    output:
        png=report(
            f"{SET}/figures/stability.png",
            caption="../resources/captions/stability.rst",
            category="Circuit",
        ),
        svg=f"{SET}/figures/stability.svg",
    log:
        f"{LOGS}/{{task}}/plot_stability.log",
    benchmark:
        f"{ROWS}/{{task}}/plot_stability.tsv"
    conda:
        ENVIRONMENT
    params:
        style=task_style,
        metric=METRIC,
        max_rows=CFG.plots.max_rows,
        code=code("plot_stability"),
    message:
        "Draw the figure stability"
    script:
        "../workflow_scripts/plot_stability.py"

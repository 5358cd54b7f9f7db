# Where attribution graphs are; no rules. Their transcoders are those of transcoder_paths.smk.

PROMPTS = {prompt.name: prompt for prompt in CFG.graphs.prompts} if CFG.graphs else {}
GRAPH_SET = SPAN_NAME
GRAPHS = f"{MODEL}/graphs/{GRAPH_SET}"
GRAPH = f"{GRAPHS}/{{prompt}}"
GRAPH_LOGS = f"{LOGS}/graphs/{GRAPH_SET}/{{prompt}}"
GRAPH_ROWS = f"{ROWS}/graphs/{GRAPH_SET}/{{prompt}}"
OF_GRAPHS = [
    f"{GRAPHS}/{prompt}/{file}"
    for prompt in PROMPTS
    for file in (
        "graph.safetensors",
        "nodes.parquet",
        "edges.parquet",
        "summary.json",
        "virtual_weights.parquet",
        "virtual_features.parquet",
    )
]
# How a graph is built, and how it is pruned.
OF_BUILDING = {
    "prepend_bos",
    "max_logits",
    "probability",
    "max_nodes",
    "reorder_every",
    "batch",
    "keep_all",
}
BUILT = CFG.graphs.model_dump(include=OF_BUILDING) if CFG.graphs else {}
PRUNED = {}
if CFG.graphs:
    PRUNED = CFG.graphs.model_dump(include={"node_share", "edge_share"})


def graph_results(wildcards):
    """Everything that the target `graphs` asks for; it ends with a sentence where none are wanted."""
    missing = "graphs" if not CFG.graphs else "transcoders" if not SPAN else None
    if missing:
        raise WorkflowError(
            f"The configuration has no section {missing}, which attribution graphs need (docs/graphs.md shows how); "
            "add it, and ask for the target graphs again."
        )
    return OF_GRAPHS + OF_GRAPH_FIGURES


def graph_prompt(wildcards):
    """What is asked of one prompt."""
    return PROMPTS[wildcards.prompt].model_dump()


def pruning_memory(wildcards, input, attempt):
    """MB of a job that prunes a whole graph: sorted float64 copies of its weights, and which of them stay."""
    return max(2000, int(12 * input.size_mb)) * attempt


wildcard_constraints:
    prompt="|".join(re.escape(name) for name in PROMPTS) or "none",

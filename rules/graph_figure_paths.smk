# Where descriptions, exported graphs and figures of graphs are; no rules. Needs the names of graph_paths.smk.

DESCRIBED = CFG.graphs.features if CFG.graphs else None
EXPORTED = CFG.graphs.export if CFG.graphs else None
GRAPH_FEATURES = [f"{GRAPHS}/features.json"] if DESCRIBED and DESCRIBED.features else []
# Supernodes are an experiment of their own: only where they are asked for does the export wait for them.
EXPORTED_SUPERNODES = (
    [f"{GRAPH}/supernodes.json"] if EXPORTED and EXPORTED.supernodes else []
)
OF_GRAPH_FIGURES = GRAPH_FEATURES + [
    f"{GRAPHS}/{prompt}/{file}"
    for prompt in PROMPTS
    for file in (
        "graph.json",
        "figures/attribution_graph.png",
        "figures/attribution_graph.svg",
    )
]

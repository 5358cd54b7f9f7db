# Where experiments on attribution graphs are; no rules. Needs the names of graph_paths.smk and transcoder_paths.smk.

GRAPH_FIGURES = f"{GRAPH}/figures"
GRAPH_PLOTS = ["supernodes", "interventions", "heads"]
MOTIFS = f"{GRAPHS}/motifs"
OF_GRAPH_EXPERIMENTS = [
    f"{GRAPHS}/{prompt}/figures/{plot}.{kind}"
    for prompt in PROMPTS
    for plot in GRAPH_PLOTS
    for kind in ("png", "svg")
]
OF_MOTIFS = [f"{MOTIFS}/figures/motifs.{kind}" for kind in ("png", "svg")]


def graph_experiment_results(wildcards):
    """Everything that the target `graph_experiments` asks for; chains recur over several prompts, or not at all."""
    graph_results(wildcards)  # ends with a sentence where there are no graphs
    enough = len(PROMPTS) >= CFG.graphs.motifs.least
    return [*OF_GRAPH_EXPERIMENTS, *(OF_MOTIFS if enough else [])]


def motif_results(wildcards):
    """Everything that the target `graph_motifs` asks for."""
    graph_results(wildcards)
    return OF_MOTIFS


def wanted_supernodes(wildcards):
    """Supernodes by hand of one prompt: those of all prompts, and its own over them."""
    section = CFG.graphs.supernodes
    return {**section.by_hand, **section.prompts.get(wildcards.prompt, {})}


def wanted_interventions(wildcards):
    """Interventions by hand on one prompt."""
    return [
        one.model_dump(exclude={"prompts"})
        for one in CFG.graphs.interventions.wanted
        if not one.prompts or wildcards.prompt in one.prompts
    ]


def experiment_keys(name, *left_out):
    """What a section of the experiments says, but for keys that single prompts share out."""
    if not CFG.graphs:
        return {}
    return getattr(CFG.graphs, name).model_dump(exclude=set(left_out))


def graph_style(wildcards):
    """The look of one graph's figures, which say what they are of."""
    return STYLE | {"subject": f"{CFG.model.name} · {wildcards.prompt}"}

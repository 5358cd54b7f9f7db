# Where things are; no rules.
import re

from circuitflow.attribution.paths import begin, possible_neighbours
from circuitflow.dictionaries.formats.places import local_files
from circuitflow.dictionaries.settings import used_settings
from circuitflow.models.fetching import local_files as model_files
from circuitflow.models.sites import depth_order, parse_site

MODEL = f"results/{CFG.model.name}"
BASE = f"{MODEL}/{CFG.task.name}"
TASK = f"{MODEL}/{{task}}"  # the task, or one of its clusters
DICTIONARIES = f"{MODEL}/dictionaries"
TRAINED = f"{DICTIONARIES}/{CFG.dictionaries.name}"
SET = f"{TASK}/{CFG.dictionaries.name}"
LOGS = f"logs/{CFG.model.name}"
ROWS = f"results/benchmarks/{CFG.model.name}"
LEXICON = "resources/agreement/lexicon.json"
TEMPLATES = "resources/agreement/templates.json"
ENVIRONMENT = "../envs/circuitflow.yaml"

SITES = sorted(CFG.sites, key=lambda site: depth_order(parse_site(site)))
# Upstream sites by downstream site, the metric last.
NEIGHBOURS = {down: ups for down, ups in possible_neighbours(SITES).items() if ups}
SPLITS = ["train", "test"]
CLUSTERS = range(CFG.task.clusters.count) if CFG.task.clusters else ()
TASKS = [CFG.task.name, *(f"{CFG.task.name}/cluster-{i}" for i in CLUSTERS)]
PLOTS = [
    "task_accuracy",
    "training_curves",
    "layer_importance",
    "agreement",
    "top_features",
    "faithfulness",
    "circuit",
    "audit",
]
METHOD = CFG.scores.method
# Without effects of single pairs and positions there is nothing to resample or to lay out.
if METHOD not in ("decoder_only", "exact"):
    PLOTS += ["circuit_positions", "stability"]
SCORES = [f"{SET}/scores/{METHOD}/{site}.parquet" for site in SITES]
PAIR_SCORES = [f"{SET}/scores/{METHOD}/{site}.pairs.parquet" for site in SITES]
POSITION_SCORES = [f"{SET}/scores/{METHOD}/{site}.positions.parquet" for site in SITES]
FEATURES = [f"{SET}/features/{site}.json" for site in SITES]
EDGES = [f"{SET}/edges/{down}.parquet" for down in NEIGHBOURS]
EDGE_DRAWS = [f"{SET}/edges/{down}.draws.parquet" for down in NEIGHBOURS]
COMPUTE = CFG.compute.model_dump()
METRIC = CFG.task.metric.model_dump(exclude={"position"})
STYLE = CFG.plots.model_dump(include={"dpi", "font_size", "palette"})
GPU = int(CFG.compute.device == "cuda")  # GPUs that a job which can use one asks for


# A study's dictionaries are sets of one site each, named {study}/{variant}.
VARIANTS = CFG.variants()
STUDY_NAME = CFG.study.name if CFG.study else "none"
STUDY = f"{MODEL}/studies/{STUDY_NAME}"
STUDY_SITE = CFG.study.site if CFG.study else SITES[0]
OF_ALL = {(name, site): settings for name, site, settings in CFG.every_dictionary()}
NAMES = "|".join(sorted({re.escape(name) for name, _ in OF_ALL}, reverse=True))
IMPORTED = "|".join(
    re.escape(f"{name}/{site}.json")
    for (name, site), settings in OF_ALL.items()
    if settings.kind == "pretrained"
)


wildcard_constraints:
    set=NAMES,
    site=r"[a-z_]+(\.\d+)?",
    down=r"[a-z_]+(\.\d+)?",
    task="|".join(map(re.escape, TASKS)),
    method="atp|ig|relp|exact|decoder_only|sae_in_loop",
    split="train|test",
    variant="|".join(map(re.escape, VARIANTS)) or "none",


def named_files(patterns):
    """Files that the user named, so that a change of one re-runs what reads it."""
    return sorted(
        str(file)
        for pattern in patterns
        for file in Path().glob(pattern)
        if file.is_file()
    )


def dictionary_settings(wildcards):
    """What shapes one dictionary: keys that its kind does not use are no parameters of its training."""
    return used_settings(OF_ALL[wildcards.set, wildcards.site].model_dump())


def source_files(wildcards):
    """Files on disk that a pretrained dictionary is read from; none if it comes from the hub."""
    source = OF_ALL[wildcards.set, wildcards.site].source.model_dump()
    return [str(file) for file in local_files(source, wildcards.site)]


def method_gradients(wildcards):
    """The gradients of a method that has its own, in place of those of the clean run."""
    if wildcards.method not in ("ig", "relp"):
        return {}
    folder = f"{MODEL}/{wildcards.task}/gradients.{wildcards.method}"
    return {f"method_gradients_{split}": f"{folder}/{split}.json" for split in SPLITS}


def in_loop_tables():
    """Outputs of score_in_loop: three tables of every site."""
    endings = {"scores": "", "positions": ".positions", "pairs": ".pairs"}
    return {
        f"{name}_{site.replace('.', '_')}": f"{SET}/scores/sae_in_loop/{site}{ending}.parquet"
        for site in SITES
        for name, ending in endings.items()
    }


def method_tables():
    """Score tables of every method that is compared, by method."""
    return {
        f"{name}_{method}": [
            f"{SET}/scores/{method}/{site}{ending}.parquet" for site in SITES
        ]
        for method in CFG.scores.compare
        for name, ending in (("scores", ""), ("pairs", ".pairs"))
    }


def cluster_tables():
    """Outputs of cluster_contexts: the confident pairs of each cluster, where the {task} rules look for them."""
    return {
        f"{name}_{i}": f"{BASE}/cluster-{i}/confident/{name}.parquet"
        for i in CLUSTERS
        for name in (*SPLITS, "prompts")
    }


def edge_sites(down):
    """The sites on which edges into one depend: no other can stand between it and its neighbours."""
    wanted = {*NEIGHBOURS[down], begin(down, SITES), down}
    return [site for site in SITES if site in wanted]


def downstream_end(wildcards):
    """Dictionary and scores at the downstream end of edges; the metric has neither."""
    if wildcards.down == "metric":
        return {}
    scores = f"{SET}/scores/{METHOD}/{wildcards.down}.parquet"
    return {
        "dictionary_down": f"{TRAINED}/{wildcards.down}.json",
        "scores_down": scores.format(task=wildcards.task),
    }


MODEL_FILES = [str(file) for file in model_files(CFG.model.source.model_dump())]
# Sentences of the task go into the corpus only where a source asks for them.
CORPUS_PAIRS = (
    f"{BASE}/pairs/train.jsonl"
    if any(source.kind == "task" for source in CFG.corpus.sources)
    else []
)
CORPUS_FILES = named_files(
    source.glob for source in CFG.corpus.sources if source.kind == "files"
)
# Without an encoder there are scores and rankings, and nothing that needs features to be active.
ENCODED = not any(
    CFG.dictionary(site).kind == "pretrained"
    and CFG.dictionary(site).source.format == "decoder"
    for site in SITES
)


def with_features(target, files):
    """Input of a target that needs features to be active: without an encoder it ends here, in one sentence."""

    def wanted(wildcards):
        if ENCODED:
            return files()
        # What else an input function raises, Snakemake shows with a traceback.
        raise SystemExit(
            f"Error: Target {target} needs encoders, and a site's dictionary is a decoder alone "
            "(format decoder); choose dictionaries with encoders."
        )

    return wanted


# Plots of the page; where there are clusters, their figure is on the pages of all.
PAGE_PLOTS = {plot: f"{SET}/figures/{plot}" for plot in PLOTS} | (
    {"clusters": f"{BASE}/figures/clusters"} if CLUSTERS else {}
)


# How a circuit is chosen from ranked nodes and scored edges.
CHOSEN = {
    "nodes": CFG.circuit.nodes.model_dump(exclude_none=True),
    "edges": CFG.circuit.edges.model_dump(exclude_none=True),
    "pool": CFG.edges.pool,
    "ranking": CFG.scores.ranking,
}


def searched():
    """The table of the search for a faithful circuit, where one is wanted."""
    return [f"{SET}/search.parquet"] if CFG.circuit.nodes.faithfulness else []

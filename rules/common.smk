# Where things are; no rules.
import re
from itertools import pairwise

from circuitflow.dictionaries.formats.places import local_files
from circuitflow.dictionaries.settings import used_settings
from circuitflow.models.fetching import local_files as model_files
from circuitflow.models.sites import depth_order, parse_site
from circuitflow.provenance import code_digest

MODEL = f"results/{CFG.model.name}"
TASK = f"{MODEL}/{CFG.task.name}"
DICTIONARIES = f"{MODEL}/dictionaries"
TRAINED = f"{DICTIONARIES}/{CFG.dictionaries.name}"
SET = f"{TASK}/{CFG.dictionaries.name}"
LOGS = f"logs/{CFG.model.name}"
ROWS = f"results/benchmarks/{CFG.model.name}"
LEXICON = "resources/agreement/lexicon.json"
TEMPLATES = "resources/agreement/templates.json"
ENVIRONMENT = "../envs/circuitflow.yaml"

SITES = sorted(CFG.sites, key=lambda site: depth_order(parse_site(site)))
SITE_PAIRS = list(pairwise(SITES))
SPLITS = ["train", "test"]
PLOTS = [
    "task_accuracy",
    "training_curves",
    "layer_importance",
    "agreement",
    "top_features",
    "faithfulness",
    "circuit",
]
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
    up=r"[a-z_]+(\.\d+)?",
    down=r"[a-z_]+(\.\d+)?",
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


def code(rule):
    """Digest of a rule's script and of the library it imports: what makes a code edit re-run the rule."""
    return code_digest(Path(workflow.basedir) / "workflow_scripts" / f"{rule}.py")


MODEL_FILES = [str(file) for file in model_files(CFG.model.source.model_dump())]
CORPUS_FILES = named_files(
    source.glob for source in CFG.corpus.sources if source.kind == "files"
)
# Without an encoder there are scores and rankings, and nothing that needs features to be active.
ENCODED = not any(
    CFG.dictionary(site).kind == "pretrained"
    and CFG.dictionary(site).source.format == "decoder"
    for site in SITES
)
KEPT = [
    f"{MODEL}/model/manifest.json",
    f"{MODEL}/corpus/manifest.json",
    f"{MODEL}/activations/manifest.json",
    expand(f"{TRAINED}/{{site}}.json", site=SITES),
    expand(f"{TASK}/gradients/{{split}}.json", split=SPLITS),
    expand(f"{SET}/scores/{{site}}.parquet", site=SITES),
    f"{SET}/ranking/nodes.parquet",
]
OF_FEATURES = [
    expand(f"{TRAINED}/{{site}}.quality.parquet", site=SITES),
    expand(f"{SET}/features/{{site}}.json", site=SITES),
    [f"{SET}/edges/{up}__{down}.parquet" for up, down in SITE_PAIRS],
    f"{SET}/circuit.graphml",
    f"{SET}/faithfulness.parquet",
    expand(f"{SET}/figures/{{plot}}.{{kind}}", plot=PLOTS, kind=["png", "svg"]),
    f"{SET}/report.html",
]
OF_SCORES = expand(
    f"{SET}/figures/{{plot}}.{{kind}}",
    plot=["task_accuracy", "agreement"],
    kind=["png", "svg"],
)

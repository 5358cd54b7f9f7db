# Where things are; no rules.
from itertools import pairwise

from circuitflow.models.fetching import local_files
from circuitflow.models.sites import depth_order, parse_site
from circuitflow.provenance import code_digest

MODEL = f"results/{CFG.model.name}"
TASK = f"{MODEL}/{CFG.task.name}"
TRAINED = f"{MODEL}/dictionaries/{CFG.dictionaries.name}"
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


wildcard_constraints:
    site=r"[a-z_]+(\.\d+)?",
    up=r"[a-z_]+(\.\d+)?",
    down=r"[a-z_]+(\.\d+)?",
    split="train|test",


def named_files(patterns):
    """Files that the user named, so that a change of one re-runs what reads it."""
    return sorted(
        str(file)
        for pattern in patterns
        for file in Path().glob(pattern)
        if file.is_file()
    )


def dictionary_settings(site):
    """What shapes one site's dictionary; the file of weights is an input, not a parameter."""
    return CFG.dictionary(site).model_dump(exclude={"weights"})


def code(rule):
    """Digest of a rule's script and of the library it imports: what makes a code edit re-run the rule."""
    return code_digest(Path(workflow.basedir) / "workflow_scripts" / f"{rule}.py")


MODEL_FILES = [str(file) for file in local_files(CFG.model.source.model_dump())]
CORPUS_FILES = named_files(
    source.glob for source in CFG.corpus.sources if source.kind == "files"
)
# Without an encoder there are scores and rankings, and nothing that needs features to be active.
ENCODED = all(CFG.dictionary(site).kind != "decoder_only" for site in SITES)
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

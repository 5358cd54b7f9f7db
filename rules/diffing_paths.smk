# Where the results of model diffing are: the second model, both models' activations, the crosscoder; no rules.
from circuitflow.dictionaries.wiring import crosscoder

DIFFED = CFG.diffing
DIFF_NAME = DIFFED.name if DIFFED else "none"
DIFF_SITE = DIFFED.site if DIFFED else SITES[0]
DIFF = f"{MODEL}/diffing/{DIFF_NAME}"
SECOND_MODEL = f"{DIFF}/model/manifest.json"
DIFF_CROSSCODER = f"{DICTIONARIES}/{DIFF_NAME}/crosscoder.json"
# The run's own store serves where it has the site.
FIRST_ACTIVATIONS = (
    f"{MODEL}/activations/manifest.json"
    if DIFF_SITE in SITES
    else f"{DIFF}/activations/first.json"
)
SECOND_ACTIVATIONS = f"{DIFF}/activations/second.json"
BOTH_ACTIVATIONS = f"{DIFF}/activations/joint.json"
HARVEST_OF_SITE = {
    **CFG.activations.model_dump(),
    "sites": [DIFF_SITE],
    "model_dtype": CFG.model.dtype,
    "compute": COMPUTE,
}
TUNED_BY = DIFFED.tuning if DIFFED else None
TUNING_FILES = named_files(
    [TUNED_BY.text.glob] if TUNED_BY and TUNED_BY.text.kind == "files" else []
)
TUNING_PAIRS = (
    f"{BASE}/pairs/train.jsonl" if TUNED_BY and TUNED_BY.text.kind == "task" else []
)
SECOND_FILES = (
    [str(file) for file in model_files(DIFFED.model.model_dump(), "diffing.model")]
    if DIFFED and DIFFED.model
    else []
)


def second_name():
    """What the second model is called, by where it comes from."""
    source = DIFFED.model.model_dump() if DIFFED else {}
    return str(
        source.get("id")
        or source.get("package")
        or source.get("path")
        or "the second model"
    )


# What figures call the two.
DIFF_MODELS = [
    CFG.model.name,
    (
        f"{CFG.model.name} fine-tuned for {TUNED_BY.steps} steps"
        if TUNED_BY
        else second_name()
    ),
]


def diff_settings(keys):
    """Parameters of a stage: some keys of the section."""
    return DIFFED.model_dump(include=set(keys.split())) if DIFFED else {}


def diff_results(wildcards):
    """Everything that the target `diff` asks for; it ends with a sentence where there is no second model."""
    if not DIFFED:
        raise WorkflowError(
            "The configuration has no section diffing, so that there is no second model; name one, or how it is made by "
            "fine-tuning (docs/diffing.md shows how), and ask for the target diff again."
        )
    return [
        DIFF_CROSSCODER,
        *(f"{DIFF}/{name}" for name in ("features.parquet", "summary.json")),
        f"{DIFF}/descriptions.json",
        *(f"{DIFF}/figures/diffing.{kind}" for kind in ("png", "svg")),
    ]

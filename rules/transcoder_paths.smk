# Where transcoders, crosscoders and their activations are; no rules.
from circuitflow.dictionaries.wiring import cross_layer, crosscoder, transcoder
from circuitflow.models.depth import chosen_layers

# Transcoders of the run: one file a layer, or one for all.
SPAN = CFG.transcoders
SPAN_NAME = SPAN.name if SPAN else "none"
TRANSCODERS = f"{DICTIONARIES}/{SPAN_NAME}"
SPAN_ACTIVATIONS = f"{MODEL}/activations/{SPAN_NAME}/manifest.json"


def span_layers():
    """Layers that have transcoders."""
    if not SPAN:
        return []
    source = CFG.model.source.model_dump()
    manifest = Path(f"{MODEL}/model/manifest.json")
    try:
        return chosen_layers(SPAN.layers, source, manifest, "transcoders.layers")
    except UserError as error:
        raise WorkflowError(str(error)) from None


SPAN_LAYERS = span_layers()
SPAN_SITES = [f"{kind}.{i}" for kind in ("mlp_in", "mlp") for i in SPAN_LAYERS]
IS_CROSS_LAYER = bool(SPAN) and SPAN.architecture == "cross_layer"
IS_TRAINED_SPAN = bool(SPAN) and SPAN.kind != "pretrained"
TRANSCODER_FILES = (
    [f"{TRANSCODERS}/cross_layer.json"]
    if IS_CROSS_LAYER
    else [f"{TRANSCODERS}/mlp_in.{i}.json" for i in SPAN_LAYERS]
)

CROSS = CFG.crosscoder
CROSS_NAME = CROSS.name if CROSS else "none"
CROSSCODER = f"{DICTIONARIES}/{CROSS_NAME}"
# The run's own store serves where it has the sites.
CROSS_ACTIVATIONS = (
    f"{MODEL}/activations/{CROSS_NAME}/manifest.json"
    if CROSS and not set(CROSS.sites) <= set(SITES)
    else f"{MODEL}/activations/manifest.json"
)


def harvest_of(section, sites):
    """Parameters of a store of activations of its own."""
    return {
        **CFG.activations.model_dump(),
        "dtype": section.dtype,
        "sites": sites,
        "model_dtype": CFG.model.dtype,
        "compute": COMPUTE,
    }


def span_source(wildcards):
    """Files on disk that pretrained transcoders are read from; none if they come from the hub."""
    source = SPAN.source.model_dump()
    layers = SPAN_LAYERS if "layer" not in wildcards.keys() else [wildcards.layer]
    return sorted(
        {str(file) for i in layers for file in local_files(source, f"mlp_in.{i}")}
    )


def transcoder_results(wildcards):
    """Everything that the target `transcoders` asks for; it ends with a sentence where none are wanted."""
    if not SPAN:
        raise WorkflowError(
            "The configuration has no section transcoders; name a set of them (docs/graphs.md shows how), and ask for "
            "the target transcoders again."
        )
    plots = ["quality", *(["training"] if IS_TRAINED_SPAN else [])]
    return [
        *TRANSCODER_FILES,
        f"{TRANSCODERS}/quality.parquet",
        *expand(
            f"{TRANSCODERS}/figures/{{plot}}.{{kind}}", plot=plots, kind=["png", "svg"]
        ),
    ]


def crosscoder_results(wildcards):
    """Everything that the target `crosscoder` asks for; it ends with a sentence where none is wanted."""
    if not CROSS:
        raise WorkflowError(
            "The configuration has no section crosscoder; name one and its sites (docs/dictionaries.md shows how), and "
            "ask for the target crosscoder again."
        )
    return [
        f"{CROSSCODER}/crosscoder.json",
        f"{CROSSCODER}/quality.parquet",
        f"{CROSSCODER}/features.parquet",
        f"{CROSSCODER}/norms.parquet",
        *expand(
            f"{CROSSCODER}/figures/{{plot}}.{{kind}}",
            plot=["quality", "training", "layers"],
            kind=["png", "svg"],
        ),
    ]

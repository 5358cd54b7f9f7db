# Where the results of a study are, the tables and figures of its variants; no rules.
OF_STUDY = ["training", "frontier", "weights", "firing", "emergence", "seeds"]
OF_VARIANT = ["map", "heatmap", "correlation", "concepts"]
TRAINED_VARIANTS, MEASURED_VARIANTS = (
    expand(
        f"{DICTIONARIES}/{STUDY_NAME}/{{variant}}/{STUDY_SITE}.{{ending}}",
        variant=VARIANTS,
        ending=ending,
    )
    for ending in ("json", "quality.parquet")
)


def tables_of_variants(name):
    """One table of study_features, of every variant."""
    return expand(f"{STUDY}/{{variant}}/{name}.parquet", variant=VARIANTS)


def study_results(wildcards):
    """Everything that the target `study` asks for; it ends with a sentence where there is nothing to study."""
    if not VARIANTS:
        raise WorkflowError(
            "The configuration has no section study, so that there is nothing to compare; name a study, its site and "
            "its variants (docs/dictionaries.md shows how), and ask for the target study again."
        )
    figures = OF_STUDY + expand("{variant}/{plot}", variant=VARIANTS, plot=OF_VARIANT)
    return [
        *TRAINED_VARIANTS,
        *MEASURED_VARIANTS,
        f"{STUDY}/variants.parquet",
        *expand(
            f"{STUDY}/figures/{{plot}}.{{kind}}", plot=figures, kind=["png", "svg"]
        ),
    ]

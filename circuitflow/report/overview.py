"""What was run, as names and values for the top of the page."""

from collections.abc import Mapping
from typing import Any

from circuitflow.plots.numbers import whole
from circuitflow.plots.tables import rows
from circuitflow.report.result import Result

METRICS = {
    "logit_difference": "m = logit(wrong answer) − logit(right answer)",
    "logit": "m = −logit(right answer)",
    "log_probability": "m = −log p(right answer)",
    "kl": "m = KL divergence from the model's own predictions",
}
SIGN = "read where the answer follows; an effect IE > 0 supports the right answer"


def overview(result: Result) -> list[tuple[str, str]]:
    """Names and values, in the order of the workflow."""
    config = result.config
    source = ", ".join(
        f"{key} {value}" for key, value in config["model"]["source"].items() if key != "sha256"
    )
    cases = ", ".join(str(case).replace("_", " ") for case in dict.fromkeys(result.prompts["case"]))
    metric = METRICS.get(config["task"].get("metric", {}).get("kind", "logit_difference"), "m")
    return [
        ("model", f"{result.model} ({source})"),
        ("task", f"{result.task}: {cases}"),
        ("metric", f"{metric}, {SIGN}"),
        ("pairs that pass the confidence filter", _pairs(result)),
        ("sites", ", ".join(result.circuit.sites)),
        ("dictionaries", _dictionaries(config["dictionaries"])),
    ]


def _pairs(result: Result) -> str:
    clean = rows(result.prompts, side="clean")
    parts = {split: rows(clean, split=split)["kept"] for split in dict.fromkeys(clean["split"])}
    return ", ".join(f"{int(kept.sum())} of {len(kept)} {split}" for split, kept in parts.items())


def _dictionaries(section: Mapping[str, Any]) -> str:
    text = f"{section['name']}: {section['kind']}, {whole(section['d_dict'])} features"
    if section["kind"] in ("topk", "random"):
        text += f", {section['k']} active per token"
    return text + (
        ", other settings for " + ", ".join(section["overrides"]) if section.get("overrides") else ""
    )

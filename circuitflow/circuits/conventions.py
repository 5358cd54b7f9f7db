"""What the numbers of an evaluation mean: one line per choice that systems make differently."""

from collections.abc import Mapping
from typing import Any

BECOME = {
    "mean": "per-position mean over patched inputs (evaluation.means) of the same case (clean ones if unpaired)",
    "zero": "0, so that an empty circuit leaves b_dec",
    "patched": "value in the patched run of the same prompt",
    "resample": "value in the patched run of another training prompt of the same case",
}
"""What ablated nodes become, by ablation."""

TREATMENTS = {
    "scored": "error nodes compete by score with features",
    "kept": "all error nodes are in every circuit, beside the strongest features, but not in the empty one",
    "removed": "no error node is in any circuit",
    "resid_removed": "none of the residual stream is",
    "other_removed": "none of other sites is",
}


def conventions(params: Mapping[str, Any]) -> dict[str, str]:
    """What the numbers mean: one line per choice that systems make differently."""
    first = params["sites"][0]
    opposed = params["metric"]["kind"] == "logit_difference"
    sign = (
        "wrong - right: negative when the model is right"
        if opposed
        else "distance from the clean run: 0 is the model itself"
        if params["metric"]["kind"] == "kl"
        else "the lower, the more the model is right"
    )
    order = {"absolute": "|score|", "signed": "score, most positive first,"}[params["ranking"]]
    used = [params["ablation"], *params.get("further_ablations", [])]
    return {
        "metric": f"{params['metric']['kind']}, {sign}",
        "ablation": f"{params['ablation']}: nodes outside become their {BECOME[params['ablation']]}",
        **{f"ablation_{name}": f"nodes outside become their {BECOME[name]}" for name in used[1:]},
        "empty_circuit": "every node of every site ablated",
        "start": f"everything before {first} is free in C, in M and in the empty circuit",
        "further_starts": "sites before the start are free in C, in M and in the empty circuit",
        "encoding": "each site encodes the stream as the sites before have left it",
        "selection": f"nodes by {order} on train over all sites, error nodes included",
        "errors": "; ".join(f"{name}: {text}" for name, text in TREATMENTS.items()),
        "neurons": "coordinates of the same sites by their AtP score, in place of features and errors",
        "random": "features with an effect on train; as many per site and position as the circuit, the same errors",
        "aggregate": params["aggregate"],
        "areas": "CPR: area under F, CMD: under |1 - F|, over the share of nodes kept (trapezoids, linear share)",
    }

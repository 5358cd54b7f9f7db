"""Architecture adapters: where each model family keeps its blocks, sublayer outputs, norms and unembedding.

An adapter is a row of a table of attribute paths. The paths hold for the module classes of transformers; a
model of a family that is not listed but built like one that is can be run under that one's name
(``model.architecture``).
"""

from dataclasses import dataclass, replace
from typing import Any

from circuitflow.errors import UserError, nearest
from circuitflow.models.sites import Site

MODEL_FOLDER = "hf"
"""Folder of a prepared model within its object: what transformers saves and loads."""


@dataclass(frozen=True)
class Architecture:
    """Paths from the causal language model (``blocks``, ``final_norm``, ``unembed``) and from a block (the rest)."""

    name: str
    blocks: str
    final_norm: str
    z: str
    """Module whose input is the site z.L."""
    attn: str
    """Module whose output is the site attn.L."""
    resid_mid: str
    """Module whose input is the site resid_mid.L."""
    mlp: str
    """Module whose output is the site mlp.L."""
    mlp_in: str = "mlp"
    """Module whose input is the site mlp_in.L."""
    unembed: str = "lm_head"
    parallel: bool = False
    """Whether attention and MLP read the same stream, so that there is nothing between them."""

    def place(self, site: Site) -> tuple[str, str]:
        """Module path within the site's block ("" is the block itself) and its side: "input" or "output"."""
        return {
            "embed": ("", "input"),
            "z": (self.z, "input"),
            "attn": (self.attn, "output"),
            "resid_mid": (self.resid_mid, "input"),
            "mlp_in": (self.mlp_in, "input"),
            "mlp": (self.mlp, "output"),
            "resid": ("", "output"),
        }[site.kind]


_LLAMA = Architecture(
    name="llama",
    blocks="model.layers",
    final_norm="model.norm",
    z="self_attn.o_proj",
    attn="self_attn",
    resid_mid="post_attention_layernorm",
    mlp="mlp",
)
_GEMMA2 = replace(
    _LLAMA,
    name="gemma2",
    attn="post_attention_layernorm",
    resid_mid="pre_feedforward_layernorm",
    mlp="post_feedforward_layernorm",
)
_GPT2 = Architecture(
    name="gpt2",
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    z="attn.c_proj",
    attn="attn",
    resid_mid="ln_2",
    mlp="mlp",
)
_GPT_NEOX = Architecture(
    name="gpt_neox",
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    z="attention.dense",
    attn="attention",
    resid_mid="post_attention_layernorm",
    mlp="mlp",
)

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        _LLAMA,
        _GPT2,
        _GPT_NEOX,
        replace(_LLAMA, name="gemma"),
        _GEMMA2,
        replace(_GEMMA2, name="gemma3_text"),
        replace(_LLAMA, name="qwen2"),
        replace(_LLAMA, name="qwen3"),
    )
}
"""Adapters by the ``model_type`` of the model's configuration."""


def architecture_of(config: Any, name: str = "auto") -> Architecture:
    """The adapter for a transformers configuration; ``name`` other than "auto" chooses the row by hand.

    :raises UserError: there is no such adapter.
    """
    wanted = config.model_type if name == "auto" else name
    if wanted not in ARCHITECTURES:
        raise UserError(
            f"Architecture '{wanted}' is not supported ({nearest(wanted, ARCHITECTURES)}); choose another model, "
            "or set model.architecture to the one of these that it is built like."
        )
    # Only GPT-NeoX has the choice, and its default is parallel blocks (Pythia).
    return replace(ARCHITECTURES[wanted], parallel=bool(getattr(config, "use_parallel_residual", False)))


def check_site(site: Site, arch: Architecture, n_layers: int) -> None:
    """Check that a model has this site.

    :raises UserError: its layer is beyond the model's depth, or its blocks have no such place.
    """
    if site.layer is not None and site.layer >= n_layers:
        raise UserError(
            f"Site '{site}' is beyond the model's depth: it has {n_layers} layers, counted from 0; "
            f"the last such site is '{site.kind}.{n_layers - 1}'."
        )
    if site.kind == "resid_mid" and arch.parallel:
        raise UserError(
            f"Site '{site}' does not exist in this model: its attention and MLP read the same residual stream "
            f"side by side; use 'resid.{site.layer}', 'attn.{site.layer}' or 'mlp.{site.layer}'."
        )


def site_width(site: Site, config: Any) -> int:
    """Width of the vector at a site, from a model's configuration: d_model, or n_heads · d_head for z."""
    if site.kind != "z":
        return int(config.hidden_size)
    heads = int(config.num_attention_heads)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * int(d_head)

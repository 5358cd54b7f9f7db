"""What names tell of the site that a dictionary reads: hooks of TransformerLens, modules of transformers, folders."""

import re
from dataclasses import dataclass

from circuitflow.errors import UserError
from circuitflow.models.sites import KINDS, Site, parse_site

HOOKS = {
    "hook_resid_post": "resid",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",  # TransformerLens means the stream before the norm
    "hook_attn_out": "attn",
    "attn.hook_z": "z",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_out": "mlp",
}
"""Hooks of a block in TransformerLens, and in circuit-tracer, which adds mlp.hook_in."""

MODULES = {
    r"": "resid",
    r"\.(?:self_attn|attention|attn)": "attn",
    r"\.(?:self_attn\.)?o_proj\.input": "z",
    r"\.pre_feedforward_layernorm": "mlp_in",
    r"\.(?:mlp|post_feedforward_layernorm)": "mlp",
}
"""Modules of a block in transformers whose output is a site (``.input``: whose input is)."""

NORMED = "ln2.hook_normalized"


@dataclass(frozen=True)
class Hint:
    """The part of a site that is known; None is unknown."""

    kind: str | None = None
    layer: int | None = None

    def __str__(self) -> str:
        if self.kind is None:
            return "an unknown site" if self.layer is None else f"layer {self.layer}"
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    def fits(self, site: Site) -> bool:
        """Whether a site can be the one that is meant."""
        return self.kind in (None, site.kind) and (self.layer is None or self.layer == site.layer)


def choose_site(where: str, hint: Hint, site: str | None) -> str:
    """The site asked for, checked against what is known; what is known, where none was asked for.

    :param where: the dictionary, for messages.
    :raises UserError: they contradict each other, or the site stays unknown.
    """
    if site is not None:
        if not hint.fits(parse_site(site)):
            raise UserError(
                f"Dictionary {where} was made for {hint}, not for {site}; use it there, or name another dictionary."
            )
        return site
    if hint.kind is None or (hint.layer is None and hint.kind != "embed"):
        known = "" if hint == Hint() else f"was made for {hint} and "
        raise UserError(
            f"Dictionary {where} {known}does not tell its site; name it "
            f"(one of {', '.join(kind if kind == 'embed' else f'{kind}.L' for kind in KINDS)}) with --site."
        )
    return str(Site(hint.kind, hint.layer))


def same_layer(site: str, kind: str) -> str:
    """The site of another kind in the same block."""
    return str(Site(kind, parse_site(site).layer))


def hint_of_hook(where: str, hook: str) -> Hint:
    """The site of a TransformerLens hook, or of a module of transformers.

    :raises UserError: there is no such site here.
    """
    hint = _known_hook(hook) or hint_of_module(hook)
    if hint is not None and hint.kind is not None:
        return hint
    reason = " (the normed stream before the norm's weight; mlp_in.L is after it)" if NORMED in hook else ""
    raise UserError(
        f"Dictionary {where} reads {hook}, which is no site here{reason}; choose one that reads {', '.join(HOOKS)}, or "
        "hook_resid_pre."
    )


def hook_of_site(site: str) -> str:
    """The TransformerLens hook of a site."""
    found = parse_site(site)
    if found.layer is None:
        return "blocks.0.hook_resid_pre"
    names = {kind: name for name, kind in reversed(HOOKS.items())}  # the first name of each kind
    return f"blocks.{found.layer}.{names[found.kind]}"


def hint_of_module(name: str) -> Hint | None:
    """The site of a module of transformers, as in ``layers.5.mlp``; None if the name is no module's."""
    if re.search(r"(?:^|[./])(?:embed_tokens|embed_in)$", name):
        return Hint("embed")
    found = re.search(r"(?:^|[./])(?:layers|h|blocks)\.(\d+)((?:\.\w+)*)$", name)
    if not found:
        return None
    rest = found[2].removesuffix(".output")
    kinds = [kind for pattern, kind in MODULES.items() if re.fullmatch(pattern, rest)]
    return Hint(kinds[0] if kinds else None, int(found[1]))


def hint_of_path(path: str) -> Hint:
    """What the names of folders and files tell, the last first: ``resid_post_layer_4``, ``layer_12/width_16k``."""
    for part in reversed(path.split("/")):
        layer = re.search(r"(?:(resid|attn|mlp)(?:_post|_out)?_)?layer_?(\d+)(?!\d)", part)
        if layer:
            return Hint(layer[1], int(layer[2]))
        site = re.fullmatch(rf"({'|'.join(KINDS)})\.(\d+)(?:\.\w+)?", part)
        if site:
            return Hint(site[1], int(site[2]))
        if re.fullmatch(r"embed(?:ding)?(?:\.\w+)?", part):
            return Hint("embed")
        bare = re.sub(r"\.(?:safetensors|pt|npy)$", "", part)
        module = _known_hook(bare) or hint_of_module(bare)
        if module is not None:
            return module
    return Hint()


def _known_hook(hook: str) -> Hint | None:
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if not found:
        return None
    layer = int(found[1])
    if found[2] == "hook_resid_pre":
        return Hint("resid", layer - 1) if layer else Hint("embed")
    return Hint(HOOKS[found[2]], layer) if found[2] in HOOKS else None

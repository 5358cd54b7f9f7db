"""Sets of transcoders of circuit-tracer, a file a layer, and its cross-layer transcoders.

A cross-layer transcoder of L layers is ``W_enc_i.safetensors`` {W_enc_i (d_dict, d), b_enc_i, b_dec_i [, threshold_i]}
and ``W_dec_i.safetensors`` {W_dec_i (d_dict, L − i, d)} for i = 0 … L − 1, with b_dec_i added at the output of layer i
(circuit_tracer 0.5, transcoder/cross_layer_transcoder.py). Its JumpReLU has no ReLU inside. A skip connection there
adds x·W_skip, where that of a single layer adds x·W_skipᵀ; its own files hold none, but are read with one.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from circuitflow.dictionaries.dictionary import Dictionary
from circuitflow.dictionaries.family import Family, site_width
from circuitflow.dictionaries.formats.circuit_tracer import (
    CONFIG,
    check_rule,
    config_of,
    needs_threshold,
    read_config,
    sites_of,
    tensors_of,
    write_config,
)
from circuitflow.dictionaries.formats.places import Place
from circuitflow.dictionaries.formats.reading import KIND, read_weights
from circuitflow.dictionaries.formats.writing import check_writable, write_folder, write_weights
from circuitflow.errors import UserError
from circuitflow.models.sites import parse_site

ENCODER = re.compile(r"W_enc_(\d+)\.safetensors")
SKIP = "W_skip_{}"


def is_cross_layer(place: Place) -> bool:
    """Whether the files of a place are those of a cross-layer transcoder."""
    return ENCODER.fullmatch(place.weights.name) is not None


def read_cross_layer(place: Place) -> Family:
    """A cross-layer transcoder: one member a layer, each of which writes its own layer and the later ones.

    :raises UserError: a file is missing or damaged, or its layers do not fit together.
    """
    layers = sorted(int(found[1]) for file in place.files if (found := ENCODER.fullmatch(Path(file).name)))
    if layers != list(range(len(layers))):
        raise UserError(
            f"Cross-layer transcoder {place} has files of layers {', '.join(map(str, layers))}; expected every layer "
            "from 0 on: fetch it again."
        )
    config = read_config(place.beside(CONFIG))
    sites = [sites_of(place, config, layer, None) for layer in layers]
    return Family(tuple(_member(place, layer, sites) for layer in layers))


def write_set(folder: Path, family: Family) -> None:
    """Write transcoders of single layers, or a cross-layer transcoder, as circuit-tracer reads them.

    :raises UserError: it is neither, leaves out a layer, or selects features in a way that the library does not; or the
        folder is in use.
    """
    single = all(len(member.writes) == 1 for member in family.members[:-1])
    for member in family.members:
        check_rule(member, ("threshold", "topk") if single else ("threshold",))
    layers = [_layer(member) for member in family.members]
    if layers != list(range(len(layers))):
        raise UserError(
            f"Format circuit_tracer holds a transcoder of every layer from 0 on, and here are those of layers "
            f"{', '.join(map(str, layers))}; write each by itself, or as circuitflow."
        )
    widths = sorted({member.d_dict for member in family.members})
    if len(widths) > 1:
        raise UserError(
            f"Format circuit_tracer holds transcoders of one number of features, and these have "
            f"{', '.join(map(str, widths))}; write each by itself, or as circuitflow."
        )
    if single:
        _write_layers(folder, family)
    else:
        _write_cross_layer(folder, family)


def _member(place: Place, layer: int, sites: Sequence[tuple[str, str]]) -> Dictionary:
    """The member of one layer; its biases and skip connection go to the first site that it writes, which is its own."""
    encoder = read_weights(_beside(place, f"W_enc_{layer}.safetensors"))
    decoder = read_weights(_beside(place, f"W_dec_{layer}.safetensors"))
    W_enc = encoder.take(f"W_enc_{layer}", "d_dict", "d_in")
    b_enc, b_dec = (
        encoder.take(f"b_enc_{layer}", "d_dict"),
        encoder.take(f"b_dec_{layer}", "d_out"),
    )
    threshold, skip = f"threshold_{layer}", SKIP.format(layer)
    thresholds = encoder.take(threshold, "d_dict") if encoder.has(threshold) else torch.zeros_like(b_enc)
    own = encoder.take(skip, "d_in", "d_out").T if encoder.has(skip) else None
    encoder.done()
    decoder.sizes.update({"d_dict": len(W_enc), "later": len(sites) - layer, "d_out": len(b_dec)})
    W_dec = decoder.take(f"W_dec_{layer}", "d_dict", "later", "d_out")
    decoder.done()
    rest = (len(sites) - layer - 1) * len(b_dec)
    return Dictionary(
        kind=KIND,
        reads=(sites[layer][0],),
        writes=tuple(writes for _, writes in sites[layer:]),
        select="threshold",
        W_enc=W_enc.contiguous(),
        b_enc=b_enc,
        W_dec=W_dec.reshape(len(W_enc), -1).contiguous(),
        b_dec=torch.cat([b_dec, b_dec.new_zeros(rest)]),
        notes={"format": "circuit_tracer"},
        extra={"threshold": thresholds},
        W_skip=None if own is None else torch.cat([own, own.new_zeros(rest, own.shape[1])]),
    )


def _beside(place: Place, name: str) -> Path:
    found = place.beside(name)
    if found is None:
        raise UserError(f"Cross-layer transcoder {place} has no {name}; fetch it again.")
    return found


def _layer(member: Dictionary) -> int:
    """The layer of a transcoder within one block.

    :raises UserError: it reads several sites, or writes one that lies before the block that it reads.
    """
    layer = parse_site(member.reads[0]).layer if len(member.reads) == 1 else None
    if layer is None or member.writes == member.reads or parse_site(member.writes[0]).layer != layer:
        raise UserError(
            f"Format circuit_tracer holds transcoders, and this dictionary reads {', '.join(member.reads)} and writes "
            f"{', '.join(member.writes)}; write it as circuitflow."
        )
    return layer


def _write_layers(folder: Path, family: Family) -> None:
    members = list(family.members)
    hooks = {(parse_site(one.reads[0]).kind, parse_site(one.writes[0]).kind) for one in members}
    skips = {one.W_skip is not None for one in members}
    if len(hooks) > 1 or len(skips) > 1:
        raise UserError(
            "Format circuit_tracer holds transcoders that read and write the same places in every layer, all with a "
            "skip connection or all without; write each by itself, or as circuitflow."
        )
    for member in members:
        check_writable("circuit_tracer", member)
    if len({(member.select, member.settings.get("k")) for member in members}) > 1:
        raise UserError(
            "Format circuit_tracer holds transcoders that select features alike in every layer, and these differ in "
            "rule or k; write each by itself, or as circuitflow."
        )
    config = config_of(members[0].reads[0], members[0].writes[0], "transcoder_set", members)
    write_folder(folder, {}, "layer_0.safetensors", tensors_of(members[0]))
    for layer, member in enumerate(members[1:], start=1):
        write_weights(folder / f"layer_{layer}.safetensors", tensors_of(member))
    write_config(folder, config)


def _write_cross_layer(folder: Path, family: Family) -> None:
    members = list(family.members)
    _check_cross_layer(family)
    jumps = any(needs_threshold(member) for member in members)
    config = config_of(members[0].reads[0], members[0].writes[0], "cross_layer_transcoder", members)
    for layer, member in enumerate(members):
        width = site_width(member)
        assert member.W_enc is not None
        encoder: dict[str, Tensor] = {
            f"W_enc_{layer}": member.W_enc,
            f"b_enc_{layer}": member.b_enc,
            f"b_dec_{layer}": _bias(family, member.writes[0], width),
        }
        if jumps:
            encoder[f"threshold_{layer}"] = member.extra["threshold"]
        decoder = {f"W_dec_{layer}": member.W_dec.reshape(member.d_dict, -1, width)}
        if layer == 0:
            write_folder(folder, {}, "W_enc_0.safetensors", encoder)
        else:
            write_weights(folder / f"W_enc_{layer}.safetensors", encoder)
        write_weights(folder / f"W_dec_{layer}.safetensors", decoder)
    write_config(folder, config)


def _check_cross_layer(family: Family) -> None:
    """Check that every member writes its own layer and all later ones, and nothing that the files cannot hold."""
    for layer, member in enumerate(family.members):
        if member.W_enc is None:
            raise UserError(
                f"Format circuit_tracer needs an encoder, and the member at {member.reads[0]} is a decoder alone; "
                "write it as circuitflow."
            )
        if member.W_skip is not None:
            raise UserError(
                "Format circuit_tracer holds no skip connection in files of cross-layer transcoders, and this one at "
                f"{member.reads[0]} has one; write it as circuitflow."
            )
        if member.writes != family.writes[layer:]:
            raise UserError(
                f"Format circuit_tracer holds cross-layer transcoders that write every later layer, and the one at "
                f"{member.reads[0]} writes {', '.join(member.writes)} of {', '.join(family.writes)}; write it as "
                "circuitflow."
            )


def _bias(family: Family, site: str, width: int) -> Tensor:
    """All that members add at a site whatever is active, wherever it is kept."""
    total = torch.zeros(width, dtype=torch.float64)
    for member in family.members:
        if site in member.writes:
            at = member.writes.index(site) * width
            total += member.b_dec[at : at + width].double()
    return total.float()

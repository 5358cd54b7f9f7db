"""The dictionary object: weights in raw activation units, sparse encoding and decoding, one safetensors file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitflow.dictionaries.codes import Codes, concatenate_codes, decode_codes, empty_codes
from circuitflow.dictionaries.screening import FEWEST_VECTORS, is_native, screened
from circuitflow.dictionaries.selection import is_compiled, selection
from circuitflow.dictionaries.tensors import read_tensors, write_tensors
from circuitflow.errors import UserError
from circuitflow.store.objects import read_manifest

COMMON = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")
DESCRIBED = {"kind", "reads", "writes", "select", "d_in", "d_model", "d_dict", "skip", "settings", "notes"}
WEIGHTS_FILE = "weights.safetensors"
ENCODE_ENTRIES = 1 << 24  # pre-activations held at once while encoding (64 MiB in float32)

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class Skip:
    """The recorded outlier rule: tokens the dictionary was not made for. Their features are 0, their error x − b_dec.

    ``positions`` count from the start of a prompt or block; ``max_norm`` is in raw activation units, None for
    no limit. A dictionary that reads several sites has a limit for each in ``max_norms``, and skips a token where the
    vector of any of them exceeds its own.
    """

    positions: tuple[int, ...] = ()
    max_norm: float | None = None
    max_norms: tuple[float | None, ...] = ()

    def mask(self, x: Float[Tensor, "n d_model"], positions: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """True for the vectors to skip."""
        skipped = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        for position in self.positions:
            skipped |= positions.to(x.device) == position
        if self.max_norm is not None:
            skipped |= x.norm(dim=1) > self.max_norm
        for part, limit in zip(x.chunk(len(self.max_norms) or 1, dim=1), self.max_norms, strict=False):
            if limit is not None:
                skipped |= part.norm(dim=1) > limit
        return skipped

    def described(self) -> dict[str, Any]:
        """Plain JSON form."""
        several = {"max_norms": list(self.max_norms)} if self.max_norms else {}
        return {"positions": list(self.positions), "max_norm": self.max_norm, **several}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "Skip":
        """From :meth:`described`."""
        return cls(
            tuple(described["positions"]), described["max_norm"], tuple(described.get("max_norms", ()))
        )


NO_SKIP = Skip()


@dataclass(frozen=True)
class Dictionary:
    """Features that read one site, or several, and write it back: x̂ = Σ_i f_i·W_dec[i] + b_dec.

    A transcoder writes another site than it reads: ŷ = Σ_i f_i·W_dec[i] + b_dec [+ W_skip·x], and ŷ approximates
    the vector there. Pre-activations are x·W_encᵀ + b_enc; ``select`` names the rule that picks the active ones,
    ``settings`` holds its numbers (k …). Normalisation and a subtracted mean are folded in: inputs and outputs are
    raw activations; those of several sites, all of one width, lie side by side. On the active set the encoder is
    linear: ∂f_i/∂x = 1[i active]·W_enc[i]. ``W_enc`` is None when only a decoder is known.
    """

    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    select: str
    W_enc: Float[Tensor, "d_dict d_in"] | None
    b_enc: Float[Tensor, " d_dict"]
    W_dec: Float[Tensor, "d_dict d_model"]
    b_dec: Float[Tensor, " d_model"]
    skip: Skip = NO_SKIP
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)  # facts about the making, for people to read
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # the rule's per-feature tensors: threshold …
    W_skip: Float[Tensor, "d_model d_in"] | None = None  # what a transcoder passes on of its input, linearly

    @property
    def d_model(self) -> int:
        """Width of the site that it writes."""
        return self.W_dec.shape[1]

    @property
    def d_in(self) -> int:
        """Width of the site that it reads; that of the site it writes where only a decoder is known."""
        return self.d_model if self.W_enc is None else self.W_enc.shape[1]

    @property
    def d_dict(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    def encode(self, x: Float[Tensor, "n d_in"], positions: Int64[Tensor, " n"]) -> Codes:
        """Active features of each vector; none for vectors that the outlier rule skips.

        :param positions: of each vector within its prompt or block.
        :raises UserError: the dictionary has no encoder, or the vectors have another width.
        """
        if self.W_enc is None:
            raise UserError(
                f"Dictionary of kind {self.kind!r} at {', '.join(self.reads)} has no encoder, only a decoder; "
                "use it for decoder-only scores or choose a kind with an encoder."
            )
        self._check_width(x)
        if not self.d_dict:
            return empty_codes(x.shape[0], 0, self.W_dec)
        kept = (~self.skip.mask(x, positions)).nonzero()[:, 0]
        step = max(1, ENCODE_ENTRIES // self.d_dict)
        parts = [self._encode_block(x[rows]) for rows in kept.split(step) if rows.numel()]
        if not parts:
            return empty_codes(x.shape[0], self.d_dict, self.W_dec)
        return _spread(concatenate_codes(parts), kept, x.shape[0])

    def decode(self, codes: Codes, x: Float[Tensor, "n d_in"] | None = None) -> Float[Tensor, "n d_model"]:
        """Reconstruction from codes, b_dec included, and W_skip·x if there is a skip connection.

        :param x: the vectors that were encoded; needed by a skip connection alone, which outliers have too.
        :raises ValueError: there is a skip connection and no ``x``.
        """
        decoded = decode_codes(codes, self.W_dec) + self.b_dec
        if self.W_skip is None:
            return decoded
        if x is None:
            raise ValueError(
                f"the dictionary at {', '.join(self.reads)} has a skip connection: decode needs x"
            )
        return decoded + x.to(self.W_skip.dtype) @ self.W_skip.T

    def error(
        self,
        x: Float[Tensor, "n d_in"],
        codes: Codes,
        written: Float[Tensor, "n d_model"] | None = None,
    ) -> Float[Tensor, "n d_model"]:
        """What features and skip connection do not explain: x − x̂.

        :param written: for a transcoder, the vectors at the site that it writes.
        :raises ValueError: the dictionary writes another site than it reads, and ``written`` is not given.
        """
        if written is None and self.reads != self.writes:
            raise ValueError(f"the dictionary writes {', '.join(self.writes)}: error needs what is there")
        return (x if written is None else written) - self.decode(codes, x)

    def active(self, codes: Codes, features: Int64[Tensor, " m"]) -> Bool[Tensor, "n m"]:
        """Whether each of a few features is active in each vector."""
        return codes.columns(features) != 0

    def to(self, target: torch.device | str | torch.dtype) -> "Dictionary":
        """The dictionary on another device or in another floating-point type."""
        moved = {name: tensor.to(target) for name, tensor in self._tensors().items()}
        common: dict[str, Any] = {name: moved[name] for name in COMMON if name in moved}
        return replace(self, extra={name: moved[name] for name in self.extra}, **common)

    def _tensors(self) -> dict[str, Tensor]:
        common = {name: getattr(self, name) for name in COMMON}
        return {name: tensor for name, tensor in common.items() if tensor is not None} | dict(self.extra)

    def _encode_block(self, x: Float[Tensor, "n d_in"]) -> Codes:
        assert self.W_enc is not None
        if self._is_screened(x):
            if self.select == "topk":
                return screened(x, self.W_enc, self.b_enc, k=int(self.settings["k"]))
            return screened(x, self.W_enc, self.b_enc, threshold=self.extra["threshold"])
        pre = linear(x.to(self.W_enc.dtype), self.W_enc, self.b_enc)
        return selection(self.select)(pre, self.settings, self.extra)

    def _is_screened(self, x: Float[Tensor, "n d_in"]) -> bool:
        """Whether a product in bfloat16 goes first."""
        assert self.W_enc is not None
        return (
            self.select in ("topk", "threshold")
            and x.dtype == self.W_enc.dtype == torch.float32
            and len(x) >= FEWEST_VECTORS
            and is_compiled(x, len(x) * self.d_dict)
            and is_native()
        )

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise UserError(
                f"Dictionary at {', '.join(self.reads)} is {self.d_in} wide but was given vectors of width "
                f"{x.shape[-1]}; use a dictionary trained on this model and site."
            )


def linear(
    x: Float[Tensor, "n d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "n d_out"]:
    """x·weightᵀ + bias, without a gradient; in float32 on the CPU by oneDNN, a quarter quicker than torch's default."""
    given = [x, weight] if bias is None else [x, weight, bias]
    with torch.no_grad():
        if ONEDNN and all(_is_plain(tensor) for tensor in given):
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return product
        return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.numel() > 0


def save_dictionary(path: Path, dictionary: Dictionary) -> None:
    """Write weights and description to one safetensors file; equal dictionaries give equal bytes."""
    described = {
        "kind": dictionary.kind,
        "reads": list(dictionary.reads),
        "writes": list(dictionary.writes),
        "select": dictionary.select,
        "d_in": dictionary.d_in,
        "d_model": dictionary.d_model,
        "d_dict": dictionary.d_dict,
        "skip": dictionary.skip.described(),
        "settings": dict(dictionary.settings),
        "notes": dict(dictionary.notes),
    }
    write_tensors(path, dictionary._tensors(), described)


def load_dictionary(path: Path, width: int | None = None) -> Dictionary:
    """Read a dictionary from its manifest (``{site}.json``) or straight from a safetensors file.

    :param width: width of the site that it must read, if known.
    :raises UserError: the file is missing, damaged, not a dictionary of ours, or of another width.
    """
    file = _weights_path(Path(path))
    described, tensors = _read(file)
    if width is not None and described["d_in"] != width:
        raise UserError(
            f"Dictionary {file} is {described['d_in']} wide but the site is {width} wide; "
            "use a dictionary trained on this model and site."
        )
    return Dictionary(
        kind=described["kind"],
        reads=tuple(described["reads"]),
        writes=tuple(described["writes"]),
        select=described["select"],
        W_enc=tensors.get("W_enc"),
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        skip=Skip.of(described["skip"]),
        settings=described["settings"],
        notes=described["notes"],
        extra={name: tensor for name, tensor in tensors.items() if name not in COMMON},
        W_skip=tensors.get("W_skip"),
    )


def _weights_path(path: Path) -> Path:
    if path.suffix != ".json":
        return path
    return read_manifest(path, kind="dictionary").folder(path) / WEIGHTS_FILE


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, described = read_tensors(file)
    known = described is not None and set(described) >= DESCRIBED
    if described is None or not known or not {"b_enc", "W_dec", "b_dec"} <= set(tensors):
        raise UserError(f"File {file} is not a circuitflow dictionary; name one made by train_dictionary.")
    _check_shapes(file, described, tensors)
    return described, tensors


def _check_shapes(file: Path, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    d_dict, d_in, d_out = (described[name] for name in ("d_dict", "d_in", "d_model"))
    expected: dict[str, tuple[int, ...]]
    expected = {"W_enc": (d_dict, d_in), "W_dec": (d_dict, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected.get(name, (d_dict,)):
            raise UserError(
                f"Dictionary {file}: {name} has shape {tuple(tensor.shape)}, expected "
                f"{expected.get(name, (d_dict,))}; the file is damaged or was edited: train or import it again."
            )


def _spread(codes: Codes, kept: Int64[Tensor, " m"], n: int) -> Codes:
    """Codes of the vectors ``kept`` of ``n``; the others get no entries."""
    if kept.shape[0] == n:
        return codes
    counts = torch.zeros(n, dtype=torch.int64, device=kept.device)
    counts[kept] = codes.counts()
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Codes(offsets, codes.features, codes.values, codes.d_dict)

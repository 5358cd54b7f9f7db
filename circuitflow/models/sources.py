"""Stage ``prepare_model``: a model from a wheel, the hub or a local path, converted once to safetensors."""

import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import logging as transformers_logging

from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.architectures import Architecture
from circuitflow.models.fetching import KEY, Source, fetch, fetch_from_hub, unpack
from circuitflow.models.saving import check_model, save_model
from circuitflow.progress import logger

Check = Callable[[Any, Any], None]
"""What more a model has to fulfil: it gets the configuration and the tokenizer, and raises UserError."""


def prepare_model(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """Stage: fetch, check and convert a model; the result is what :mod:`circuitflow.models.loading` loads.

    Params: ``source`` (see :func:`circuitflow.models.fetching.fetch`; code of the model's own is run only with
    ``remote_code: true``), ``architecture`` ("auto" or the name of an adapter), ``required_sites`` (checked before
    the weights are read). Toys are another stage: :func:`circuitflow.models.toy.prepare_toy`.

    :raises UserError: the model cannot be had, is not supported, or lacks a required site.
    """
    del inputs  # local files are declared so that the workflow notices when they change
    prepare(params, out)


def prepare(params: Mapping[str, Any], out: Output, key: str = KEY, further: Check | None = None) -> None:
    """What :func:`prepare_model` does, for the model of any ``key`` of the configuration.

    All checks are made before the weights are fetched (hub) and read.
    """
    transformers_logging.disable_progress_bar()
    source = params["source"]
    reader = _Reader(key, bool(source.get("remote_code", False)))

    def checked(place: Path) -> tuple[Any, Architecture]:
        config = reader.config(place)
        arch = check_model(config, params["architecture"], params["required_sites"])
        if further is not None:
            further(config, reader.tokenizer(place))
        return config, arch

    if source["kind"] == "hub":
        checked(fetch_from_hub(source, key, weights=False))
    with _files(source, key) as place:
        config, arch = checked(place)
        logger.info("converting %s", place.name)
        hf = _from_gguf(place, config) if _is_gguf(place) else reader.model(place)
        out.details["remote_code"] = reader.remote_code
        save_model(hf, reader.tokenizer(place), arch, out)


@contextmanager
def _files(source: Source, key: str) -> Iterator[Path]:
    """The model's folder or GGUF file."""
    place = fetch(source, key)
    if place is None:
        raise UserError(f"{key}.kind '{source['kind']}' is made by the stage prepare_toy, not fetched.")
    if source["kind"] != "wheel":
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="circuitflow-") as temporary:
        yield unpack(place, source["file"], Path(temporary), key)


@dataclass(frozen=True)
class _Reader:
    """``from_pretrained`` on files that are here, with its errors as sentences."""

    key: str
    remote_code: bool

    def config(self, place: Path) -> Any:
        return self._read(AutoConfig, place)

    def tokenizer(self, place: Path) -> Any:
        return self._read(AutoTokenizer, place)

    def model(self, place: Path) -> Any:
        return self._read(AutoModelForCausalLM, place, dtype="auto")

    def _read(self, what: Any, place: Path, **settings: Any) -> Any:
        folder, file = (place.parent, {"gguf_file": place.name}) if _is_gguf(place) else (place, {})
        try:
            return what.from_pretrained(
                folder, local_files_only=True, trust_remote_code=self.remote_code, **file, **settings
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UserError(
                f"Model {place.name} ({self.key}) cannot be read by {what.__name__} ({reason}); check that its files "
                "are complete and that transformers supports it."
            ) from error


def _is_gguf(place: Path) -> bool:
    return place.suffix == ".gguf"


def _from_gguf(path: Path, config: Any) -> Any:
    """A float32 model with the de-quantised weights of a GGUF file.

    The weights go into a fresh model of the same configuration: transformers refuses to save the model that its own
    loader makes from a GGUF file, and that loader needs another package.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with redirect_stderr(io.StringIO()):  # a progress bar that would fill the log
        tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    found = model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted({*found.missing_keys} - tied) + sorted(found.unexpected_keys)
    if missing:
        raise UserError(
            f"GGUF file {path.name} does not fit its own configuration: {missing[0]} is missing or unknown."
        )
    return model

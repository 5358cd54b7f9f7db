"""The stage ``prepare_second_model``: a model that is compared with the run's own, checked against it first."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from circuitflow.diffing.joining import check_vocabularies, check_widths
from circuitflow.jobs import Output
from circuitflow.models.architectures import MODEL_FOLDER, site_width
from circuitflow.models.loading import load_tokenizer
from circuitflow.models.sites import parse_site
from circuitflow.models.sources import prepare
from circuitflow.store.objects import read_manifest

KEY = "diffing.model"


def prepare_second_model(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. As :func:`~circuitflow.models.sources.prepare_model`, for a model that fits the run's own.

    It has the same tokens (and may have more) and the same width at the required sites; this is seen before its weights
    are fetched. Inputs ``model`` (manifest of the run's own) and ``files``; params as of ``prepare_model``.

    :raises UserError: the model cannot be had, is not supported, lacks a required site, or does not fit.
    """
    manifest = inputs["model"]
    first = _config(manifest)

    def fits(config: Any, tokenizer: Any) -> None:
        check_vocabularies(load_tokenizer(manifest).get_vocab(), tokenizer.get_vocab())
        for site in map(parse_site, params["required_sites"]):
            check_widths(site_width(site, first), site_width(site, config), str(site))

    prepare(params, out, KEY, fits)


def _config(manifest_path: Path) -> Any:
    """The configuration of a prepared model."""
    manifest = read_manifest(manifest_path, "model")
    return AutoConfig.from_pretrained(
        manifest.folder(manifest_path) / MODEL_FOLDER,
        local_files_only=True,
        trust_remote_code=bool(manifest.details.get("remote_code", False)),
    )

"""The stage ``prepare_second_model``: a model that is compared with the run's own, checked against it first."""

from collections.abc import Mapping
from typing import Any

from circuitflow.diffing.joining import check_vocabularies, check_widths
from circuitflow.jobs import Output
from circuitflow.models.architectures import site_width
from circuitflow.models.prepared import load_config, load_tokenizer
from circuitflow.models.sites import parse_site
from circuitflow.models.sources import prepare

KEY = "diffing.model"


def prepare_second_model(inputs: Mapping[str, Any], params: Mapping[str, Any], out: Output) -> None:
    """STAGE. As :func:`~circuitflow.models.sources.prepare_model`, for a model that fits the run's own.

    It has the same tokens (and may have more) and the same width at the required sites; this is seen before its weights
    are fetched. Inputs ``model`` (manifest of the run's own) and ``files``; params as of ``prepare_model``.

    :raises UserError: the model cannot be had, is not supported, lacks a required site, or does not fit.
    """
    manifest = inputs["model"]
    first = load_config(manifest)

    def fits(config: Any, tokenizer: Any) -> None:
        check_vocabularies(load_tokenizer(manifest).get_vocab(), tokenizer.get_vocab())
        for site in map(parse_site, params["required_sites"]):
            check_widths(site_width(site, first), site_width(site, config), str(site))

    prepare(params, out, KEY, fits)

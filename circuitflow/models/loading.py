"""Loading what ``prepare_model`` made."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from circuitflow.errors import UserError, nearest
from circuitflow.models.architectures import MODEL_FOLDER, architecture_of
from circuitflow.models.prepared import load_tokenizer
from circuitflow.models.running import LanguageModel
from circuitflow.store.objects import read_manifest

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_model(manifest_path: Path, dtype: str = "float32", device: str = "cpu") -> LanguageModel:
    """The prepared model with its tokenizer.

    :param dtype: precision of weights and activations: float32, bfloat16, float16, or float64 for exact checks.
    :param device: as torch names it: "cpu", "cuda", "cuda:1".
    :raises UserError: no prepared model, unknown precision, or no such device.
    """
    if dtype not in DTYPES:
        raise UserError(f"compute.dtype '{dtype}' is unknown: {nearest(dtype, DTYPES)}.")
    transformers_logging.disable_progress_bar()
    manifest = read_manifest(manifest_path, "model")
    trusted = bool(manifest.details.get("remote_code", False))
    hf: Any = AutoModelForCausalLM.from_pretrained(
        manifest.folder(manifest_path) / MODEL_FOLDER,
        dtype=DTYPES[dtype],
        local_files_only=True,
        trust_remote_code=trusted,
    )
    arch = architecture_of(hf.config, manifest.details["architecture"])
    return LanguageModel(hf.to(checked_device(device)), load_tokenizer(manifest_path), arch)


def checked_device(name: str) -> torch.device:
    """The device of this name.

    :raises UserError: this machine, or this build of torch, does not have it.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UserError(f"compute.device '{name}' is not on this machine: {nearest(name, here)}.") from None
    return device

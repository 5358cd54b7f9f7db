"""What a prepared model says of itself without its weights: tokenizer and configuration.

Apart from the loading of models, whose imports take seconds that a job on tokens alone need not pay.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from circuitflow.errors import UserError
from circuitflow.models.architectures import MODEL_FOLDER
from circuitflow.store.objects import read_manifest


def load_tokenizer(manifest_path: Path) -> Any:
    """The prepared model's tokenizer (a transformers tokenizer), without the model."""
    return _described(AutoTokenizer, manifest_path)


def load_config(manifest_path: Path) -> Any:
    """The prepared model's configuration (of transformers), without the model."""
    return _described(AutoConfig, manifest_path)


def longest_input(config: Any) -> int | None:
    """How many tokens a model takes at once by its configuration (of transformers); None if that does not say."""
    most = getattr(config, "max_position_embeddings", None)
    return None if most is None else int(most)


def check_length(what: str, tokens: int, config: Any) -> None:
    """Text is no longer than what the model was made for; learned position embeddings end there.

    :param what: the text in the sentence, such as "A block (corpus.block)".
    :raises UserError: it is longer.
    """
    most = longest_input(config)
    if most is not None and tokens > most:
        raise UserError(
            f"{what} has {tokens} tokens, but the model takes at most {most} at once; shorten it."
        )


def _described(auto: Any, manifest_path: Path) -> Any:
    manifest = read_manifest(manifest_path, "model")
    return auto.from_pretrained(
        manifest.folder(manifest_path) / MODEL_FOLDER,
        local_files_only=True,
        trust_remote_code=bool(manifest.details.get("remote_code", False)),
    )

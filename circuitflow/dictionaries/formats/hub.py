"""Dictionaries of the Hugging Face hub, kept in the hub's own cache (``HF_HOME``).

Nothing here imports torch, so that ``circuitflow fetch`` can be run on a login node, where the network is.
"""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from circuitflow.dictionaries.formats.places import Place, choose, layout_of, locate, names_below
from circuitflow.errors import UserError

Source = Mapping[str, Any]
"""The section ``source`` of a pretrained dictionary: format, and path, or id, revision and path inside the hub."""


def fetch_dictionary(source: Source, site: str | None = None) -> Place:
    """Bring a dictionary's files here, unless they are. What the cache holds is used without asking the network.

    On the hub, ``path`` names the dictionary or a file of it, or a folder where the site's layer leaves one choice.

    :raises UserError: there is no such dictionary (the sentence lists the nearest), or no network and no cached copy.
    """
    if source.get("id") is None:
        if source.get("path") is None:
            raise UserError("Key source has neither a path nor the id of a hub repository; give one of them.")
        return locate(source["format"], Path(source["path"]), site)
    kept = _cached(source)
    if kept is not None and _named_exactly(source, names_below(kept)):
        return _place(source, kept, names_below(kept), site, "")
    try:
        names = _listing(source)
        chosen = choose(source["format"], names, source.get("path"), site, f"repository {source['id']}")
        return _place(source, _download(source, chosen, names), names, site, "")
    except ConnectionError:
        if kept is None:
            raise _unreachable(source) from None
        return _place(source, kept, names_below(kept), site, "the cached part of ")


def _place(source: Source, root: Path, names: Sequence[str], site: str | None, part: str) -> Place:
    where = f"{part}repository {source['id']}"
    chosen = choose(source["format"], names, source.get("path"), site, where)
    return Place(root, chosen, layout_of(source["format"]).find(names)[chosen], source["id"])


def _named_exactly(source: Source, names: Sequence[str]) -> bool:
    """Whether the path names a dictionary among the files, which no other file of the repository can change."""
    path = str(PurePosixPath(source.get("path") or "."))
    found = layout_of(source["format"]).find(names)
    return path in found or any(path == files[0] for files in found.values())


def _cached(source: Source) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source["id"], revision=source["revision"], local_files_only=True))
    except LocalEntryNotFoundError as error:
        part = getattr(error, "snapshot_path", None)  # some of the repository's files are here
        return None if part is None else Path(part)
    except HFValidationError:
        raise UserError(
            f"Key source.id is '{source['id']}', which names no repository; write OWNER/NAME, as in "
            "google/gemma-scope-2b-pt-res."
        ) from None


def _listing(source: Source) -> list[str]:
    """Names of all files of the repository.

    :raises ConnectionError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = source["id"], source["revision"]
    try:
        return sorted(HfApi().list_repo_files(name, revision=revision))
    except GatedRepoError:
        raise _gated(name) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"The hub has no repository '{name}' that you can read; check key source.id or log in with "
            "`hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"Repository '{name}' has no revision '{revision}'; check key source.revision."
        ) from None
    except _network_errors() as error:
        raise ConnectionError from error


def _download(source: Source, chosen: str, names: Sequence[str]) -> Path:
    """The snapshot with the files of one dictionary.

    :raises ConnectionError: the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    wanted = layout_of(source["format"]).find(names)[chosen]
    patterns = [glob.escape(name) for name in wanted]
    try:
        folder = Path(snapshot_download(source["id"], revision=source["revision"], allow_patterns=patterns))
    except GatedRepoError:
        raise _gated(source["id"]) from None
    except _network_errors() as error:
        raise ConnectionError from error
    if not all((folder / name).is_file() for name in wanted):
        raise _unreachable(source)
    return folder


def _network_errors() -> tuple[type[BaseException], ...]:
    """What the hub's client raises when it finds no network: its own errors and, unwrapped, its transport's."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _gated(name: str) -> UserError:
    return UserError(
        f"Repository '{name}' is gated: accept its terms at huggingface.co/{name} and log in with `hf auth login`."
    )


def _unreachable(source: Source) -> UserError:
    return UserError(
        f"Dictionary {source['id']} {source.get('path') or ''} at revision '{source['revision']}' is not in the local "
        "cache and the hub cannot be reached; run `circuitflow fetch` where there is a network, or give a path on disk."
    )

"""Dictionaries of the hub: its real client against a hub on this machine, its cache, and no network at all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from circuitflow.dictionaries.formats.hub import fetch_dictionary
from circuitflow.errors import UserError
from tests.fixtures.hub import COMMIT, fill_cache, serve

NAME = "some/saes"
HOOKPOINTS = [f"layers.{layer}{part}" for layer in (3, 4, 11) for part in ("", ".mlp")]
NAMES = [f"{folder}/{file}" for folder in HOOKPOINTS for file in ("cfg.json", "sae.safetensors")]
FILES = {name: name.encode() for name in (*NAMES, "README.md", "layers.3.mlp/extra[1].bin")}

CLIENT = """
import json, sys
from circuitflow.dictionaries.formats.hub import fetch_dictionary
from circuitflow.errors import UserError
for source, site in json.loads(sys.argv[1]):
    try:
        place = fetch_dictionary(source, site)
        print(json.dumps([place.id, sorted(place.files), place.weights.is_file(), str(place)]))
    except UserError as error:
        print(json.dumps(str(error)))
assert "torch" not in sys.modules
"""


def source(path: str | None = None, **more: Any) -> dict[str, Any]:
    return {"format": "sparsify", "id": NAME, "revision": "main", "path": path} | more


def ask(home: Path, endpoint: str | None, *questions: tuple[dict[str, Any], str | None]) -> list[Any]:
    """Answers of a process that may reach the hub at the endpoint, or none."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HTTP", "http"))}
    env = kept | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    env |= {"HF_HUB_OFFLINE": "1"} if endpoint is None else {"HF_ENDPOINT": endpoint}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(questions)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_fetches_one_dictionary_and_then_needs_no_network(tmp_path: Path) -> None:
    with serve({NAME: FILES}) as (endpoint, downloaded):
        exact, by_site, *refused = ask(
            tmp_path,
            endpoint,
            (source("layers.11"), None),
            (source(), "mlp.3"),
            (source("layers.12"), None),
            (source(), "mlp.5"),
            (source(format="gemma_scope"), None),
            (source(id="some/other"), None),
            (source(revision="v1"), None),
            (source(id="no repository"), None),
        )
    assert exact == [
        "layers.11",
        ["layers.11/cfg.json", "layers.11/sae.safetensors"],
        True,
        f"{NAME} layers.11",
    ]
    assert by_site[:1] == ["layers.3.mlp"]
    assert sorted(downloaded) == [
        f"{folder}/{file}"
        for folder in ("layers.11", "layers.3.mlp")
        for file in ("cfg.json", "sae.safetensors")
    ]
    expected = (
        "No dictionary of format sparsify is at 'layers.12' in repository some/saes; did you mean 'layers.11'?",
        "6 dictionaries of format sparsify are in repository some/saes; name one; ",
        "No dictionary of format gemma_scope is in repository some/saes (params.npz",
        "The hub has no repository 'some/other' that you can read",
        "Repository 'some/saes' has no revision 'v1'",
        "Key source.id is 'no repository', which names no repository; write OWNER/NAME",
    )
    for sentence, start in zip(refused, expected, strict=True):
        assert sentence.startswith(start)
    assert "layers.3, layers.3.mlp, layers.4, layers.4.mlp, layers.11" in refused[1]
    again, other = ask(
        tmp_path, None, (source("layers.11/sae.safetensors"), None), (source("layers.4"), None)
    )
    assert again == exact
    assert other.startswith(
        "No dictionary of format sparsify is at 'layers.4' in the cached part of repository some/saes;"
    )
    assert other.endswith("valid: layers.11, layers.3.mlp.")


def test_a_gated_repository(tmp_path: Path) -> None:
    with serve({NAME: FILES}, gated=NAME) as (endpoint, _):
        (sentence,) = ask(tmp_path, endpoint, (source("layers.3"), None))
    assert sentence.startswith(
        "Repository 'some/saes' is gated: accept its terms at huggingface.co/some/saes"
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_without_network_the_cache_serves(cache: Path) -> None:
    files = {name: data for name, data in FILES.items() if name.startswith("layers.3")}
    snapshot = fill_cache(cache, NAME, files)
    for asked, site in (("layers.3", None), ("layers.3/sae.safetensors", None), (None, "resid.3")):
        place = fetch_dictionary(source(asked), site)
        assert (place.root, place.id, place.repository) == (snapshot, "layers.3", NAME)
    assert fetch_dictionary(source("layers.3.mlp", revision=COMMIT)).weights.is_file()


def test_a_broken_connection_is_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client lets the errors of its transport through as they are."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    transport = HfHubHTTPError.__bases__[0]
    assert not issubclass(transport, OSError)

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise transport("connection refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        fetch_dictionary(source("layers.3"))
    fill_cache(cache, NAME, FILES)
    assert fetch_dictionary(source(), "resid.4").id == "layers.4"


def test_a_half_cached_dictionary_is_none(cache: Path) -> None:
    fill_cache(
        cache, NAME, {"layers.3/cfg.json": b"x", "layers.4/cfg.json": b"x", "layers.4/sae.safetensors": b"x"}
    )
    with pytest.raises(
        UserError, match=r"at 'layers.3' in the cached part of repository .* did you mean 'layers.4'"
    ):
        fetch_dictionary(source("layers.3"))


def test_neither_network_nor_cache(cache: Path) -> None:
    with pytest.raises(
        UserError, match=r"some/saes layers.3 at revision 'main' is not in the local cache .* fetch"
    ):
        fetch_dictionary(source("layers.3"))


def test_a_source_that_names_no_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a path nor the id"):
        fetch_dictionary({"format": "sparsify", "id": None, "path": None})

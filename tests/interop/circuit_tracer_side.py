"""What runs where circuit-tracer is installed: ``write FOLDER`` sets of transcoders and what they compute.

FOLDER/{name}/layer_N.safetensors and config.yaml as the library saves and wants them, FOLDER/{name}.safetensors x,
features and reconstruction of layer 1, loaded with the library again. Gemma Scope files, of both generations, are
written in their layout and computed by the library's own loaders of them. Cross-layer transcoders: x, features and
reconstruction have the layer as their first dimension.

``read FOLDER``: for each set in it, loaded by the library as its config.yaml says, the same beside it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from circuit_tracer.transcoder import cross_layer_transcoder as cross
from circuit_tracer.transcoder import single_layer_transcoder as library
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from safetensors.torch import save_file

D, F, N = 12, 40, 50
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
CASES = {
    "relu": (lambda: torch.nn.functional.relu, False),
    "jumprelu": (lambda: JumpReLU(torch.rand(F) + 0.1, 0.1), False),
    "skip": (lambda: torch.nn.functional.relu, True),
    "jumprelu_skip": (lambda: JumpReLU(0.5 * torch.randn(F), 0.1), True),
}


def transcoder(activation, layer, skip):
    made = library.SingleLayerTranscoder(
        D, F, activation(), layer, skip_connection=skip, device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "threshold" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return made


def keep(root, name, loaded):
    x = torch.randn(N, D)
    with torch.no_grad():
        features, reconstruction = loaded.encode(x), loaded(x)
    save_file({"x": x, "features": features, "reconstruction": reconstruction}, root / f"{name}.safetensors")


def write(root):
    for name, (activation, skip) in CASES.items():
        made = {layer: transcoder(activation, layer, skip) for layer in range(2)}
        library.TranscoderSet(made, **HOOKS).to_safetensors(str(root / name))
        config = {"model_name": "toy", "model_kind": "transcoder_set", "scan": "toy", **HOOKS}
        (root / name / "config.yaml").write_text(yaml.safe_dump(config))
        paths = {layer: str(root / name / f"layer_{layer}.safetensors") for layer in made}
        cpu = torch.device("cpu")
        keep(root, name, library.load_transcoder_set(paths, "toy", **HOOKS, device=cpu)[1])
    gemma_scope_2(root)
    for name, activation in (("clt_relu", "relu"), ("clt_jumprelu", "jump_relu")):
        cross_layer(root, name, activation)


def cross_layer(root, name, activation):
    """A cross-layer transcoder of three layers, saved by the library and loaded again."""
    made = cross.CrossLayerTranscoder(
        3, F, D, activation, lazy_decoder=False, device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    made.to_safetensors(str(root / name))
    keep_all(root, name, load_cross_layer(root / name))


def load_cross_layer(folder):
    return cross.load_clt(str(folder), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)


def keep_all(root, name, loaded):
    width = loaded.b_dec.shape[1] if hasattr(loaded, "b_dec") else loaded[0].d_model
    x = torch.randn(loaded.n_layers, N, width)
    with torch.no_grad():
        features = loaded.encode(x)
        reconstruction = loaded.decode(features, x)
    save_file({"x": x, "features": features, "reconstruction": reconstruction}, root / f"{name}.safetensors")


def read(root):
    for config in sorted(root.glob("*/config.yaml")):
        folder, told = config.parent, yaml.safe_load(config.read_text())
        if told["model_kind"] == "cross_layer_transcoder":
            keep_all(root, folder.name, load_cross_layer(folder))
            continue
        paths = {layer: str(path) for layer, path in enumerate(sorted(folder.glob("layer_*.safetensors")))}
        hooks = {key: told[key] for key in HOOKS}
        assert hooks == HOOKS, hooks
        cpu = torch.device("cpu")
        loaded = library.load_transcoder_set(paths, told["scan"], **hooks, device=cpu)
        if told.get("activation") == "topk":  # as later versions do
            for one in loaded:
                one.activation_function = TopK(told["k"])
        keep_all(root, folder.name, loaded)


def gemma_scope_2(root):
    """A transcoder with skip connection, its input read after the norm's weight."""
    folder = root / "gemma_scope_2" / "transcoder" / "layer_1_width_40_l0_small_affine"
    folder.mkdir(parents=True)
    normal = {
        "w_enc": (D, F),
        "w_dec": (F, D),
        "b_enc": (F,),
        "b_dec": (D,),
        "affine_skip_connection": (D, D),
    }
    tensors = {name: 0.3 * torch.randn(shape) for name, shape in normal.items()} | {
        "threshold": torch.rand(F)
    }
    path = folder / "params.safetensors"
    save_file(tensors, path)
    loaded = library.load_gemma_scope_2_transcoder(str(path), 1, device=torch.device("cpu"))
    keep(root, "gemma_scope_2", loaded)
    folder = root / "gemma_scope" / "layer_1" / "width_40" / "average_l0_7"
    folder.mkdir(parents=True)
    normal = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
    arrays = {
        name: 0.3 * np.random.default_rng(0).standard_normal(shape, np.float32)
        for name, shape in normal.items()
    }
    arrays["threshold"] = np.random.default_rng(1).random(F, np.float32)
    np.savez(folder / "params.npz", **arrays)
    loaded = library.load_gemma_scope_transcoder(str(folder / "params.npz"), 1, device=torch.device("cpu"))
    keep(root, "gemma_scope", loaded)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))

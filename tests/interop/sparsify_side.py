"""What runs where eai-sparsify is installed: write sparse coders and what they compute, or read ours and compute.

``write FOLDER``: FOLDER/{name}/{hookpoint}/ as the library saves it, FOLDER/{name}.safetensors with x, features,
reconstruction. ``read FOLDER``: for every FOLDER/{name}/ with FOLDER/{name}.x.safetensors, FOLDER/{name}.safetensors.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

D, F, N, K = 12, 40, 50, 5
CASES = {
    "sae": ("layers.3", {"num_latents": F}),
    "expanded": ("layers.3", {"expansion_factor": 4}),
    "skip_sae": ("layers.3", {"num_latents": F, "skip_connection": True}),
    "transcoder": ("layers.3.mlp", {"num_latents": F, "transcode": True}),
    "skip_transcoder": ("layers.3.mlp", {"num_latents": F, "transcode": True, "skip_connection": True}),
}


def compute(folder, x):
    coder = SparseCoder.load_from_disk(folder)
    with torch.no_grad():
        acts, indices, _ = coder.encode(x)
        reconstruction = coder(x).sae_out
    features = torch.zeros(len(x), coder.num_latents).scatter_(1, indices, acts)
    return {"x": x, "features": features, "reconstruction": reconstruction.contiguous()}


def write(root):
    for name, (hookpoint, settings) in CASES.items():
        coder = SparseCoder(D, SparseCoderConfig(k=K, **settings))
        with torch.no_grad():
            for parameter in coder.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        coder.save_to_disk(root / name / hookpoint)
        save_file(compute(root / name / hookpoint, torch.randn(N, D)), root / f"{name}.safetensors")


def read(root):
    for given in sorted(root.glob("*.x.safetensors")):
        name = given.name.removesuffix(".x.safetensors")
        save_file(compute(root / name, load_file(given)["x"]), root / f"{name}.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))

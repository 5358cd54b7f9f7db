"""What runs where dictionary-learning is installed: ``write FOLDER`` SAEs and what they compute.

FOLDER/{name}/ holds ae.pt and config.json as its training leaves them, FOLDER/{name}.safetensors x, features and
reconstruction as the SAE that its own loader gives computes them.
"""

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

# The library's caching of activations, which is not used here, would load a whole model library.
sys.modules["nnsight"] = types.SimpleNamespace(LanguageModel=object)

import dictionary_learning.dictionary as library  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402

D, F, N, K = 12, 40, 50, 5
MADE = {
    "relu": library.AutoEncoder(D, F),
    "relu_new": library.AutoEncoderNew(D, F),
    "gated": library.GatedAutoEncoder(D, F),
    "jumprelu": library.JumpReluAutoEncoder(D, F),
    "topk": AutoEncoderTopK(D, F, K),
    "batchtopk": BatchTopKSAE(D, F, K),
    "batchtopk_untrained": BatchTopKSAE(D, F, K),
    "matryoshka": MatryoshkaBatchTopKSAE(D, F, K, [10, 30]),
}


def randomise(name, module):
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
            if key == "threshold":
                parameter.abs_().add_(0.1)
        if name in ("batchtopk", "matryoshka"):
            module.threshold.fill_(0.7)


def write(root):
    for name, module in MADE.items():
        randomise(name, module)
        folder = root / name
        folder.mkdir()
        torch.save({key: value.cpu() for key, value in module.state_dict().items()}, folder / "ae.pt")
        trainer = {"dict_class": type(module).__name__, "layer": 3, "lm_name": "toy", "submodule_name": None}
        trainer |= {"k": K} if hasattr(module, "k") else {}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d_submodule": D}}))
        loaded, _ = load_dictionary(str(folder), "cpu")
        x = torch.randn(N, D)
        with torch.no_grad():
            features = loaded.encode(x)
            reconstruction = loaded.decode(features)
        save_file(
            {"x": x, "features": features.contiguous(), "reconstruction": reconstruction.contiguous()},
            root / f"{name}.safetensors",
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    {"write": write}[sys.argv[1]](Path(sys.argv[2]))

"""What runs where circuit-tracer is installed: ``attribute FOLDER …`` the library's graphs of models and transcoders.

FOLDER/model is a Llama as transformers saves it, FOLDER/member_N.safetensors are transcoders, and FOLDER/family.json
says what is asked; FOLDER/theirs.safetensors gets the graph. benchmarks/ uses :func:`load` as well.
"""

import json
import logging
import sys
from pathlib import Path

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.activation_functions import TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformers import AutoModelForCausalLM

HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
CPU = torch.device("cpu")


class Tokens:
    """As much of a tokenizer as the library asks for; every token counts as special, so that it adds none."""

    padding_side = "right"

    def __init__(self, vocabulary):
        self.all_special_ids = list(range(vocabulary))
        self.vocab_size = vocabulary

    def decode(self, ids):
        return str(ids)


def load(folder):
    """The replacement model and what is asked, with features at every position as ours has them."""
    asked = json.loads((folder / "family.json").read_text())
    hf = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, local_files_only=True)
    config = hf.config
    lens = HookedTransformerConfig(
        n_layers=config.num_hidden_layers, d_model=config.hidden_size, d_head=config.head_dim,
        n_heads=config.num_attention_heads, n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size, d_vocab=config.vocab_size, n_ctx=64, act_fn="silu",
        normalization_type="RMS", final_rms=True, eps=config.rms_norm_eps, gated_mlp=True,
        positional_embedding_type="rotary", rotary_dim=config.head_dim, rotary_base=asked["rope_theta"],
        device="cpu", dtype=torch.float32, model_name="toy", init_weights=False,
    )  # fmt: skip
    model = TransformerLensReplacementModel(lens)
    missing = model.load_state_dict(convert_llama_weights(hf, lens), strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    model._configure_replacement_model(transcoders(folder, asked, config))
    model.zero_positions = slice(0, 0)
    model.tokenizer = Tokens(config.vocab_size)
    return model, asked


def transcoders(folder, asked, config):
    """The set of transcoders, or the cross-layer one, with the weights that we wrote."""
    members = [load_file(folder / f"member_{layer}.safetensors") for layer in range(config.num_hidden_layers)]
    d_dict, d_model = members[0]["W_enc"].shape
    if asked["cross_layer"]:
        made = CrossLayerTranscoder(
            len(members), d_dict, d_model, "relu", lazy_decoder=False, device=CPU, dtype=torch.float32,
            scan="toy", **HOOKS,
        )  # fmt: skip
        for layer, member in enumerate(members):
            made.W_enc.data[layer], made.b_enc.data[layer] = member["W_enc"], member["b_enc"]
            made.W_dec[layer].data = member["W_dec"].view(d_dict, -1, d_model).contiguous()
            made.b_dec.data[layer:] += member["b_dec"].view(-1, d_model)
        return made
    activation = TopK(asked["k"]) if asked["k"] else torch.nn.functional.relu
    found = {}
    for layer, member in enumerate(members):
        skip = "W_skip" in member
        one = SingleLayerTranscoder(
            d_model, d_dict, activation, layer, skip_connection=skip, device=CPU, dtype=torch.float32
        )
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", *(["W_skip"] if skip else [])):
            getattr(one, name).data = member[name].contiguous()
        found[layer] = one
    return TranscoderSet(found, scan="toy", **HOOKS)


def graph_of(model, asked, batch):
    """The library's graph of the prompt."""
    tokens = torch.tensor(asked["tokens"])
    return attribute(
        tokens, model, batch_size=batch, max_feature_nodes=asked["max_nodes"], max_n_logits=asked["max_logits"],
        desired_logit_prob=asked["probability"],
    )  # fmt: skip


def arrays(graph):
    """The graph's nodes and adjacency, as plain tensors."""
    return {
        "features": graph.active_features[graph.selected_features].contiguous().long(),
        "activations": graph.activation_values[graph.selected_features].contiguous().float(),
        "adjacency": graph.adjacency_matrix.contiguous(),
        "logits": graph.logit_token_ids,
        "probabilities": graph.logit_probabilities.contiguous(),
    }


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for place in map(Path, sys.argv[2:]):
        ready, questions = load(place)
        save_file(arrays(graph_of(ready, questions, questions["batch"])), place / "theirs.safetensors")

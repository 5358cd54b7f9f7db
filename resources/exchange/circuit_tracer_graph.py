"""Turn attribution graphs of circuit-tracer into plain tensors and back; run it where circuit-tracer is installed.

    python circuit_tracer_graph.py to-plain GRAPH.pt PLAIN.safetensors [TOKENIZER]
    python circuit_tracer_graph.py from-plain PLAIN.safetensors GRAPH.pt

``to-plain`` unpickles GRAPH.pt, so give it only files you trust. TOKENIZER (a name or a folder) gives the tokens' text;
by default that of the graph's model. PLAIN.safetensors holds tensors and JSON alone; `circuitflow convert-graph` reads
and writes it without running any code from it.
"""

import json
import sys

import torch
from circuit_tracer.attribution.targets import LogitTarget
from circuit_tracer.graph import Graph
from circuit_tracer.utils.tl_nnsight_mapping import UnifiedConfig
from safetensors import safe_open
from safetensors.torch import save_file

NAMES = "n_layers d_model d_head n_heads d_mlp d_vocab tokenizer_name model_name original_architecture"


def to_plain(source, target, tokenizer=None):
    """What their class holds, as tensors and JSON."""
    graph = Graph.from_pt(source)
    cfg = {name: getattr(graph.cfg, name) for name in NAMES.split()}
    said = {
        "input_string": graph.input_string,
        "token_strings": token_strings(graph, tokenizer),
        "logit_tokens": [str(one.token_str) for one in graph.logit_targets],
        "vocab_size": int(graph.vocab_size),
        "scan": graph.scan,
        "cfg": cfg,
    }
    tensors = {
        "adjacency_matrix": graph.adjacency_matrix.float(),
        "active_features": graph.active_features.long(),
        "activation_values": graph.activation_values.float(),
        "selected_features": graph.selected_features.long(),
        "input_tokens": graph.input_tokens.long(),
        "logit_token_ids": torch.tensor([int(one.vocab_idx) for one in graph.logit_targets]),
        "logit_probabilities": graph.logit_probabilities.float(),
    }
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    save_file(kept, target, metadata={"circuit_tracer": text})


def token_strings(graph, name):
    """Text of each token; "#12" where there is no tokenizer at hand."""
    from transformers import AutoTokenizer

    ids = graph.input_tokens.tolist()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name or graph.cfg.tokenizer_name)
    except (OSError, ValueError) as error:
        print(f"No tokenizer ({error.__class__.__name__}): tokens are written as numbers.", file=sys.stderr)
        return [f"#{number}" for number in ids]
    return [tokenizer.decode([number]) for number in ids]


def from_plain(source, target):
    """An object of their class, saved as they save it."""
    with safe_open(source, framework="pt") as opened:
        said = json.loads(opened.metadata()["circuit_tracer"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tokens = zip(said["logit_tokens"], tensors.pop("logit_token_ids").tolist(), strict=True)
    graph = Graph(
        input_string=said["input_string"],
        cfg=UnifiedConfig.from_dict(said["cfg"]),
        logit_targets=[LogitTarget(token_str=text, vocab_idx=number) for text, number in tokens],
        scan=said["scan"],
        vocab_size=said["vocab_size"],
        **tensors,
    )
    graph.to_pt(target)


if __name__ == "__main__":
    ways = {"to-plain": (to_plain, (4, 5)), "from-plain": (from_plain, (4,))}
    if len(sys.argv) < 2 or sys.argv[1] not in ways or len(sys.argv) not in ways[sys.argv[1]][1]:
        sys.exit(__doc__)
    ways[sys.argv[1]][0](*sys.argv[2:])

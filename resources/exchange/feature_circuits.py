"""Turn circuit files of feature-circuits into plain tensors and back; run it where the code of feature-circuits lives.

    python feature_circuits.py to-plain CIRCUIT.pt PLAIN.pt
    python feature_circuits.py from-plain PLAIN.pt CIRCUIT.pt

``to-plain`` unpickles CIRCUIT.pt with that code, so give it only files you trust. PLAIN.pt holds tensors and plain
values alone; `circuitflow convert-circuit` reads and writes it without running any code from it.
"""

import sys

import torch


def to_plain(source, target):
    """Their objects become {"act", "resc"}; everything else stays."""
    value = torch.load(source, map_location="cpu", weights_only=False)
    nodes = {}
    for name, node in value["nodes"].items():
        if name == "y" or not hasattr(node, "act"):
            continue
        nodes[name] = {"act": node.act.detach(), "resc": node.resc.detach()}
    edges = {
        up: {down: tensor.detach() for down, tensor in downs.items()}
        for up, downs in value["edges"].items()
        if up in nodes
    }
    torch.save({"examples": list(value.get("examples") or []), "nodes": nodes, "edges": edges}, target)


def from_plain(source, target):
    """{"act", "resc"} become objects of their class SparseAct."""
    from activation_utils import SparseAct

    value = torch.load(source, map_location="cpu", weights_only=True)
    nodes = {name: SparseAct(act=node["act"], resc=node["resc"]) for name, node in value["nodes"].items()}
    torch.save({**value, "nodes": nodes}, target)


if __name__ == "__main__":
    ways = {"to-plain": to_plain, "from-plain": from_plain}
    if len(sys.argv) != 4 or sys.argv[1] not in ways:
        sys.exit(__doc__)
    ways[sys.argv[1]](sys.argv[2], sys.argv[3])

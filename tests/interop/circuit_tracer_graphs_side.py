"""What runs where circuit-tracer is installed: ``files GRAPH.pt FOLDER`` its viewer files of a graph, pruned by itself;
``check GRAPH.json …`` files of ours through its own classes, of graphs and of features.
"""

import json
import sys
from pathlib import Path

from circuit_tracer.frontend import feature_models, graph_models
from circuit_tracer.utils.create_graph_files import create_graph_files
from circuit_tracer.utils.decode_url_features import decode_url_features


def files(graph, folder):
    create_graph_files(graph, "theirs", folder, scan="toy", node_threshold=0.8, edge_threshold=0.98)


def check(*paths):
    for path in map(Path, paths):
        value = json.loads(path.read_text())
        if "nodes" not in value:
            feature_models.Model.model_validate(value)
            continue
        graph = graph_models.Model.model_validate(value)
        ids = [node.node_id for node in graph.nodes]
        assert len(set(ids)) == len(ids)
        supernodes = json.dumps(graph.qParams.supernodes)
        pinned = ",".join(graph.qParams.pinnedIds)
        decode_url_features(f"http://viewer/?supernodes={supernodes}&pinnedIds={pinned}")


if __name__ == "__main__":
    {"files": files, "check": check}[sys.argv[1]](*sys.argv[2:])

"""circuit-tracer's graphs, for attribution_graphs.py."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "interop"))

from circuit_tracer_attribution_side import arrays, graph_of, load
from graphs_worker import serve, start
from safetensors.torch import save_file

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    start(sys.argv[2])
    model, asked = load(Path(sys.argv[1]))
    serve(lambda batch: graph_of(model, asked, batch), lambda graph, path: save_file(arrays(graph), path))

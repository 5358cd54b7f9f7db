"""One contestant of attribution_graphs.py: loads once, then builds a graph for every line that it is told.

Called with FOLDER and the number of threads. Reads lines {"batch": n, "keep": path or null}, answers {seconds, cpu,
peak} on the pipe named by $ANSWERS: seconds by the clock and of processor time, MB above what was resident before.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def resident(name: str) -> float:
    """A figure of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the work gives, and what it took."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, used, started = resident("VmRSS"), time.process_time(), time.perf_counter()
    result = work()
    took = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - used}
    return result, took | {"peak": resident("VmHWM") - before}


def serve(build: Callable[[int], Any], keep: Callable[[Any, Path], None]) -> None:
    """Answer until the input ends."""
    with os.fdopen(int(os.environ["ANSWERS"]), "w", buffering=1) as answers:
        answers.write(json.dumps({"ready": resident("VmRSS")}) + "\n")
        for line in sys.stdin:
            told = json.loads(line)
            graph, took = measured(lambda batch=told["batch"]: build(batch))
            if told["keep"]:
                keep(graph, Path(told["keep"]))
            answers.write(json.dumps(took) + "\n")


def start(threads: str) -> None:
    torch.set_num_threads(int(threads))

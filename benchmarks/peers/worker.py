"""A contestant in a process of its own: it trains in rounds, when told to, and answers in lines of JSON.

Runs in every contestant's environment, so it imports nothing but the standard library, numpy and torch. The
contestant's own training loop runs; what paces it is the iterator that hands it batches.
"""

import json
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

CALIBRATION = 1024  # the product that is timed beside each round is CALIBRATION³


class Pace:
    """Hands out batches, measures the rounds and stops between them."""

    def __init__(self, settings: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        self.settings = settings
        self.steps: int = settings["steps"]
        """Of the whole training; the last one is profiled and not timed."""
        self._answer = answer
        self._file = open(settings["data"], "rb", buffering=0)  # noqa: SIM115 - for the life of the process
        self._left = self._asked = 0
        self._started = 0.0
        self._gflops = 0.0
        self._baseline = _status("VmRSS")
        self._profiler: Any = None

    def batches(self) -> Iterator[torch.Tensor]:
        """``steps`` batches (batch, d_model) of float32, one after the other through the file, again and again."""
        for step in range(self.steps):
            self._between(step == self.steps - 1)
            yield self._read(step)

    def _read(self, step: int) -> torch.Tensor:
        batch, width, rows = (self.settings[key] for key in ("batch", "d_model", "rows"))
        x = np.empty((batch, width), np.float32)
        self._file.seek(step % (rows // batch) * x.nbytes)
        self._file.readinto(memoryview(x).cast("B"))
        return torch.from_numpy(x).mul_(self.settings["scale"])

    def _between(self, last: bool) -> None:
        if self._left == 0:
            if self._asked:
                seconds = time.perf_counter() - self._started
                self._answer({"steps": self._asked, "seconds": seconds, "gflops": self._gflops})
            if last:
                self._answer({"peak_mb": _status("VmHWM") - self._baseline, "baseline_mb": self._baseline})
                self._profile()
                return
            self._asked = self._left = json.loads(sys.stdin.readline())["steps"]
            self._gflops = _calibrate()
            if self._started == 0.0:  # the calibration's own matrices are gone again
                Path("/proc/self/clear_refs").write_text("5")
            self._started = time.perf_counter()
        self._left -= 1

    def _profile(self) -> None:
        tracemalloc.start(1)
        self._profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profiler.start()

    def allocations(self) -> dict[str, Any]:
        """Sizes in bytes of the allocations of the last step, largest first, and numpy's peak."""
        self._profiler.stop()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        events = self._profiler.profiler.kineto_results.events()
        sizes = sorted(
            (e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0), reverse=True
        )
        return {"torch": sizes[:50], "count": len(sizes), "total": sum(sizes), "numpy_peak": peak}


def run(train: Callable[[Pace, dict[str, Any]], dict[str, torch.Tensor]]) -> None:
    """Train as the first line of standard input says.

    :param train: from paced batches and settings to W_enc (d_dict, d_model), b_enc, W_dec (d_dict, d_model) and b_dec,
        so that features are the k largest positive entries of x·W_encᵀ + b_enc.
    """
    channel = os.fdopen(int(os.environ["ANSWERS"]), "w", buffering=1)  # libraries print to the others

    def answer(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    pace = Pace(settings, answer)
    weights = train(pace, settings)
    allocations = pace.allocations()
    np.savez(settings["out"], **{name: tensor.detach().float().numpy() for name, tensor in weights.items()})
    answer({"allocations": allocations, "torch": torch.__version__})


def _calibrate() -> float:
    """GFLOP/s of a float32 product right now."""
    a = torch.ones(CALIBRATION, CALIBRATION)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, a, out=out)
        times.append(time.perf_counter() - started)
    return 2 * CALIBRATION**3 / sorted(times)[2] / 1e9


def _status(key: str) -> float:
    """A size from /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)

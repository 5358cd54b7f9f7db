"""How much memory a training takes, said before it starts: running out of it would end the job without a word."""

from dataclasses import dataclass
from pathlib import Path

import torch

from circuitflow.dictionaries.kinds import Request
from circuitflow.dictionaries.wiring import one_site
from circuitflow.errors import UserError
from circuitflow.progress import logger

FLOAT = 4  # bytes
COPIES = 4  # of the weights: themselves, their gradients, and Adam's two moments
BATCH_COPIES = 6  # of a batch: raw, normalised, reconstruction, error, and what follows from it
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Estimate:
    """Bytes that a training needs, at least."""

    weights: int
    """Weights, gradients, Adam's moments, and the copies made to save or measure."""
    rows: int
    """Rows that are shuffled together."""
    batches: int
    """A batch and what is made of it, and held-out rows."""

    @property
    def total(self) -> int:
        """Sum."""
        return self.weights + self.rows + self.batches

    def __str__(self) -> str:
        return (
            f"{_gb(self.total)} GB of memory ({_gb(self.weights)} for weights and Adam, {_gb(self.rows)} for rows, "
            f"{_gb(self.batches)} for batches)"
        )


def parameters(request: Request) -> list[int]:
    """Weights of each dictionary of a request, in numbers."""
    wiring, d_dict, width = request.wiring or one_site(request.site), request.settings.d_dict, request.width
    return [
        d_dict * (width * (len(member.reads) + len(member.writes)) + 1) + width * len(member.writes)
        for member in wiring.members
    ]


def estimate(request: Request, rows: int, row_bytes: int, held_out: int) -> Estimate:
    """Of training, with ``rows`` kept rows of ``row_bytes`` on disk each and so many held-out ones in memory."""
    training, each = request.settings.training, parameters(request)
    wiring = request.wiring or one_site(request.site)
    columns = len(wiring.sites) * request.width
    folded = sum(each) if request.settings.kind in ("relu", "jumprelu", "gated") else 0
    saved = 3 * max(each)  # one dictionary at a time, folded in float64
    return Estimate(
        weights=FLOAT * (COPIES * sum(each) + max(folded, saved)),
        rows=min(rows, max(training.buffer_rows, training.batch)) * row_bytes,
        batches=FLOAT * columns * (BATCH_COPIES * training.batch + 2 * held_out),
    )


def check_memory(request: Request, needed: Estimate, device: torch.device) -> None:
    """Log what a training needs.

    :raises UserError: it is more than is free.
    """
    logger.info("%s: training needs about %s", request.site, needed)
    on_device = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_device else free_memory()
    wanted = needed.weights + needed.batches if on_device else needed.total
    if free is not None and wanted > free:
        raise UserError(
            f"Training the dictionaries of {request.site} needs about {needed}, and {_gb(free)} GB are free; lower "
            "d_dict, the number of layers or sites, batch or buffer_rows."
        )


def free_memory() -> int | None:
    """Bytes that this process may still take on the CPU; None where the system does not say."""
    found = []
    if MEMORY.is_file():
        lines = dict(line.split(":", 1) for line in MEMORY.read_text(encoding="utf-8").splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    for path in LIMITS:
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else "max"
        if text.isdecimal():
            found.append(int(text))
    return min(found, default=None)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"

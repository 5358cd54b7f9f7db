"""How much memory a training takes, said before it starts: running out of it would end the job without a word."""

from collections.abc import Iterator
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
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")
GROUP_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Of control groups of version 2 and of version 1: the limit, what is in use, and how names in memory.stat start."""


@dataclass(frozen=True)
class Estimate:
    """Bytes that a training needs, at least."""

    weights: int
    """Weights, gradients, Adam's moments, and the copies made to measure."""
    saved: int
    """Copies made to save, always on the CPU."""
    rows: int
    """Rows that are shuffled together, always on the CPU."""
    batches: int
    """A batch and what is made of it, and held-out rows."""

    @property
    def total(self) -> int:
        """Sum."""
        return self.weights + self.saved + self.rows + self.batches

    def __str__(self) -> str:
        return (
            f"{_told(self.total)} of memory ({_told(self.weights)} for weights and Adam, {_told(self.saved)} to save, "
            f"{_told(self.rows)} for rows, {_told(self.batches)} for batches)"
        )


def parameters(request: Request) -> list[int]:
    """Weights of each dictionary of a request, in numbers."""
    wiring, d_dict, width = request.wiring or one_site(request.site), request.settings.d_dict, request.width
    skip = width**2 if request.settings.skip else 0
    return [
        d_dict * (width * (len(member.reads) + len(member.writes)) + 1) + width * len(member.writes) + skip
        for member in wiring.members
    ]


def estimate(request: Request, rows: int, row_bytes: int, held_out: int) -> Estimate:
    """Of training, with ``rows`` kept rows of ``row_bytes`` on disk each and so many held-out ones in memory."""
    training, each = request.settings.training, parameters(request)
    wiring = request.wiring or one_site(request.site)
    columns = len(wiring.sites) * request.width
    folded = sum(each) if request.settings.kind in ("relu", "jumprelu", "gated") else 0
    return Estimate(
        weights=FLOAT * (COPIES * sum(each) + folded),
        saved=FLOAT * 3 * max(each),  # one dictionary at a time, folded in float64
        rows=min(rows, max(training.buffer_rows, training.batch)) * row_bytes,
        batches=FLOAT * columns * (BATCH_COPIES * training.batch + 2 * held_out),
    )


def check_memory(request: Request, needed: Estimate, device: torch.device) -> None:
    """Log what a training needs.

    :raises UserError: it is more than is free, on the device or on the CPU.
    """
    logger.info("%s: training needs about %s", request.site, needed)
    places = {
        "the CPU": (
            needed.total,
            free_memory(),
            "d_dict, the number of layers or sites, batch or buffer_rows",
        )
    }
    if device.type == "cuda":
        free_there = torch.cuda.mem_get_info(device)[0]
        fix_there = "d_dict, the number of layers or sites, or batch"
        places = {
            str(device): (needed.weights + needed.batches, free_there, fix_there),
            "the CPU": (needed.saved + needed.rows, free_memory(), "buffer_rows or d_dict"),
        }
    for place, (wanted, free, fix) in places.items():
        if free is not None and wanted > free:
            raise UserError(
                f"Training the dictionaries of {request.site} needs about {needed}, {_told(wanted)} of them on "
                f"{place}, where {_told(free)} are free; lower {fix}."
            )


def free_memory() -> int | None:
    """Bytes that this process may still take on the CPU; None where the system does not say.

    What the machine has, and what the limits of the process's control groups leave (a job of Slurm, a container).
    """
    lines = dict(line.split(":", 1) for line in _text(MEMORY).splitlines())
    found = [1024 * int(lines["MemAvailable"].split()[0])] if "MemAvailable" in lines else []
    found += [left for group in _groups() if (left := _left(group)) is not None]
    return min(found, default=None)


def _groups() -> Iterator[Path]:
    """Folders of the control groups that this process is in, and of all above them.

    In a container the own group may be at the root although the process's path names one further down.
    """
    for line in _text(OWN_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = GROUPS / controllers
            own = root / path.strip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(root))


def _left(group: Path) -> int | None:
    """What a control group's limit leaves, files that are cached in memory not counted; None without a limit."""
    for limit, used, start in GROUP_FILES:
        if _text(group / limit).strip().isdecimal():
            words = (line.split() for line in _text(group / "memory.stat").splitlines())
            counts = {word[0]: int(word[1]) for word in words}
            cached = sum(counts.get(f"{start}{kind}_file", 0) for kind in ("active", "inactive"))
            return max(0, int(_text(group / limit)) - int(_text(group / used) or 0) + cached)
    return None


def _text(path: Path) -> str:
    """A file of the system; empty where there is none, or none for us."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _told(size: int) -> str:
    """A size for people: "1.52 GB", "3.4 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

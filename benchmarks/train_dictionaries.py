"""Training speed, memory and quality beside other libraries, interleaved on one machine.

Each contestant trains in a process and an environment of its own (``make peers``, or ``CIRCUITFLOW_PEERS``), by its own
trainer, on the same batches; rounds of a few steps take turns, so that a ratio compares one minute with itself:

    python benchmarks/train_dictionaries.py
    python benchmarks/train_dictionaries.py --data resid12.npy --sweep 0.3 1 3

The default data are drawn by seed: sparse sums of planted directions, rare ones among them, over a background whose
spectrum falls as a power. ``--data`` takes real vectors, (rows, d_model) in a ``.npy`` file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parent / "peers"
PEERS = Path(os.environ.get("CIRCUITFLOW_PEERS", ROOT / ".venv-peers"))
RESULTS = ROOT / "results" / "benchmarks" / "train_dictionaries.json"
OURS, FLOOR = "circuitflow", "encoder product alone"


@dataclass(frozen=True)
class Contestant:
    """A trainer with the settings at which it did best in a sweep (``--sweep``)."""

    name: str
    script: str
    environment: str | None
    """Folder under the peers' environments; None is our own."""
    rate: float
    scale: float | None = 1.0
    """Root of the mean ‖x‖² that it expects; None is √d_model."""
    option: str = ""


CONTESTANTS = (
    Contestant(FLOOR, "encoder_product.py", None, 0.0),
    Contestant(OURS, "ours.py", None, 8e-3),
    Contestant("sparsify signum", "with_sparsify.py", "eai-sparsify", 7.5e-3, None, "signum"),
    Contestant("sparsify adam", "with_sparsify.py", "eai-sparsify", 1.5e-2, None, "adam"),
    Contestant("sae-lens", "with_sae_lens.py", "sae-lens", 6e-3, None),
    Contestant("dictionary-learning", "with_dictionary_learning.py", "dictionary-learning", 4e-3),
)

TARGETS = {"sparsify": 2.0, "sae-lens": 3.5}
"""Times our speed should be that of the fastest contestant so named."""


@dataclass
class Measured:
    """What a contestant showed."""

    contestant: Contestant
    speeds: list[float] = field(default_factory=list)  # tokens/s of each round
    gflops: list[float] = field(default_factory=list)  # of a product timed before each round
    peak_mb: float = 0.0  # resident memory above that after imports
    largest_mb: float = 0.0  # largest allocation of a step
    wide: int = 0  # allocations of a step as large as (batch, d_dict)
    fvu: float | None = None


class Process:
    """A contestant at work."""

    def __init__(self, contestant: Contestant, settings: dict[str, Any]) -> None:
        scale = settings["d_model"] ** 0.5 if contestant.scale is None else contestant.scale
        own = {"rate": contestant.rate, "scale": scale, "option": contestant.option}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        variables = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), "CUDA_VISIBLE_DEVICES": ""}
        if contestant.environment is None:
            variables["PYTHONPATH"] = path
        else:
            variables.pop("PYTHONPATH", None)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - for the life of the process
        answers, theirs = os.pipe()
        self._answers = os.fdopen(answers)
        self._process = subprocess.Popen(
            [interpreter(contestant), str(SCRIPTS / contestant.script)], pass_fds=[theirs],
            env=variables | {"ANSWERS": str(theirs)}, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(theirs)
        self._say(settings | own)

    def round(self, steps: int) -> dict[str, Any]:
        """Let it take that many steps and hear how long they took."""
        self._say({"steps": steps})
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """Its next answer."""
        line = self._answers.readline()
        return json.loads(line) if line else self._ended()

    def close(self) -> None:
        """Wait for its end."""
        self._process.communicate()
        self._answers.close()
        self._log.close()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
        except BrokenPipeError:
            self._ended()

    def _ended(self) -> NoReturn:
        self._log.seek(0)
        sys.exit(f"A contestant ended early: {self._process.args}\n{self._log.read()[-4000:]}")


def interpreter(contestant: Contestant) -> str:
    if contestant.environment is None:
        return sys.executable
    return str(PEERS / contestant.environment / "bin" / "python")


def present(contestants: Sequence[Contestant]) -> list[Contestant]:
    """Those whose environment is there; says which are not."""
    for name in sorted({c.environment for c in contestants if not Path(interpreter(c)).is_file()} - {None}):
        print(
            f"Skipped: no environment of {name} in {PEERS}; run `make peers`, or set CIRCUITFLOW_PEERS to where it is."
        )
    return [c for c in contestants if Path(interpreter(c)).is_file()]


def synthetic(rows: int, d_model: int, seed: int) -> np.ndarray:
    """Sparse sums of 8·d_model planted directions, 24 active on average, over a background of a tenth the variance.

    Direction i fires with a probability ∝ 1/(i + 20) and an exponential strength; the background's covariance has
    eigenvalues ∝ 1/j.
    """
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((8 * d_model, d_model), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chance = 1 / (np.arange(len(directions), dtype=np.float32) + 20)
    chance *= 24 / chance.sum()
    spectrum = np.sqrt(1 / np.arange(1, d_model + 1, dtype=np.float32))
    axes = np.linalg.qr(rng.standard_normal((d_model, d_model), dtype=np.float32))[0] * spectrum[:, None]
    out = np.empty((rows, d_model), np.float32)
    for start in range(0, rows, 8192):
        n = min(8192, rows - start)
        active = rng.random((n, len(directions)), dtype=np.float32) < chance
        strengths = np.zeros(active.shape, np.float32)
        strengths[active] = rng.exponential(size=int(active.sum())).astype(np.float32)
        signal = strengths @ directions
        noise = rng.standard_normal((n, d_model), dtype=np.float32) @ axes
        noise *= np.sqrt(0.1 * signal.var(0).sum() / noise.var(0).sum())
        out[start : start + n] = signal + noise
    return out


def prepare(x: np.ndarray, held_out: int, seed: int, path: Path) -> np.ndarray:
    """Drop norms above 5 × the median, shuffle, make the mean 0 and mean ‖x‖² 1; give the last rows, write the rest."""
    norms = np.linalg.norm(x, axis=1)
    x = x[np.random.default_rng(seed).permutation(np.flatnonzero(norms <= 5 * np.median(norms)))].astype(
        np.float32
    )
    x -= x[:-held_out].mean(0, dtype=np.float64).astype(np.float32)
    x /= np.sqrt(np.square(x[:-held_out], dtype=np.float64).sum(1).mean()).astype(np.float32)
    x[:-held_out].tofile(path)
    return x[-held_out:]


def unexplained(path: Path, x: np.ndarray, k: int) -> float:
    """FVU on held-out rows, in float64, about their global mean."""
    import torch

    with np.load(path) as file:
        w = {name: torch.from_numpy(file[name]).double() for name in file.files}
    missed = total = 0.0
    rows = torch.from_numpy(x).double()
    for part in rows.split(1024):
        values, features = (part @ w["W_enc"].T + w["b_enc"]).topk(k, dim=1)
        codes = torch.zeros(len(part), len(w["W_enc"]), dtype=torch.float64).scatter_(
            1, features, values.relu()
        )
        missed += float((part - codes @ w["W_dec"] - w["b_dec"]).square().sum())
        total += float((part - rows.mean(0)).square().sum())
    return missed / total


def race(
    contestants: Sequence[Contestant], settings: dict[str, Any], per_round: int, held_out: np.ndarray
) -> Iterator[Measured]:
    """Train all of them, in turns of a few steps; the first turn of each is not counted."""
    folder = Path(settings["data"]).parent
    files = {c: folder / f"{index}.npz" for index, c in enumerate(contestants)}
    processes = {c: Process(c, settings | {"out": str(files[c])}) for c in contestants}
    found = {c: Measured(c) for c in contestants}
    rounds = (settings["steps"] - 1) // per_round
    for number in range(rounds):
        for contestant in rotated(contestants, number):
            answer = processes[contestant].round(per_round)
            if number:
                tokens = answer["steps"] * settings["batch"]
                found[contestant].speeds.append(tokens / answer["seconds"])
                found[contestant].gflops.append(answer["gflops"])
        print(f"  round {number + 1} of {rounds}", file=sys.stderr)
    for contestant in contestants:
        finish(processes[contestant], found[contestant], settings)
        if contestant.name != FLOOR:
            scale = settings["d_model"] ** 0.5 if contestant.scale is None else contestant.scale
            found[contestant].fvu = unexplained(
                files[contestant], held_out * np.float32(scale), settings["k"]
            )
        yield found[contestant]


def rotated(contestants: Sequence[Contestant], by: int) -> list[Contestant]:
    """Another order each round, so that none always follows the same other."""
    by %= len(contestants)
    return [*contestants[by:], *contestants[:by]]


def finish(process: Process, measured: Measured, settings: dict[str, Any]) -> None:
    """Hear of memory and of the allocations of the last step."""
    measured.peak_mb = process.hear()["peak_mb"]
    allocations = process.hear()["allocations"]
    wide = 4 * settings["batch"] * settings["d_dict"]
    measured.wide = sum(size >= wide for size in allocations["torch"]) + (allocations["numpy_peak"] >= wide)
    measured.largest_mb = max(*allocations["torch"][:1], allocations["numpy_peak"]) / 2**20
    process.close()


def table(found: Sequence[Measured]) -> str:
    """One line a contestant; the ratio is ours over theirs, the median over rounds."""
    ours = next((m for m in found if m.contestant.name == OURS), found[0])
    heads = ("rate", "tokens/s", "ours ×", "GFLOP/s", "FVU", "peak MB", "largest MB", "wide")
    lines = [f"{'contestant':24}" + "".join(f"{head:>11}" for head in heads)]
    for m in found:
        fvu = "" if m.fvu is None else f"{m.fvu:.4f}"
        cells = (
            f"{m.contestant.rate:.2g}", f"{statistics.median(m.speeds):.0f}", f"{ratio(ours, m):.2f}",
            f"{statistics.median(m.gflops):.0f}", fvu, f"{m.peak_mb:.0f}", f"{m.largest_mb:.1f}", f"{m.wide}",
        )  # fmt: skip
        lines.append(f"{m.contestant.name:24}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def ratio(ours: Measured, other: Measured) -> float:
    """Our speed over theirs: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours.speeds, other.speeds, strict=True))


def verdicts(raced: Sequence[Measured], found: Sequence[Measured]) -> Iterator[str]:
    """The targets and whether they were met.

    :param raced: those of the first race: speeds and memory.
    :param found: those of all learning rates, for each one's best FVU.
    """
    ours = next(m for m in raced if m.contestant.name == OURS)
    peers = [m for m in raced if m.contestant.environment is not None]
    for name, wanted in TARGETS.items():
        if ratios := [ratio(ours, m) for m in peers if m.contestant.name.startswith(name)]:
            yield verdict(
                f"{min(ratios):.2f} × the speed of {name}", f"at least {wanted}", min(ratios) >= wanted
            )
    for m in raced:
        if m.contestant.name == FLOOR:
            share = ratio(ours, m)
            yield verdict(
                f"{share:.2f} of the speed of the encoder product alone", "at least 0.5", share >= 0.5
            )
    if peers:
        own = min(m.fvu for m in found if m.fvu is not None and m.contestant.name == OURS)
        best = min(m.fvu for m in found if m.fvu is not None and m.contestant.environment is not None)
        yield verdict(f"FVU {own:.4f}", f"at most {best:.4f}, the best of the others", own <= best)
        leanest = min(m.peak_mb for m in peers)
        yield verdict(
            f"peak memory {ours.peak_mb:.0f} MB",
            f"at most {leanest:.0f}, the leanest",
            ours.peak_mb <= leanest,
        )
    yield verdict(f"{ours.wide} allocations of (batch, d_dict) in a step", "none", ours.wide == 0)


def verdict(found: str, wanted: str, met: bool) -> str:
    return f"{'met   ' if met else 'MISSED'} {found} (wanted: {wanted})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help=".npy of (rows, d_model) vectors; default: drawn by seed")
    add("--rows", type=int, default=139_264, help="rows drawn where no data is given")
    add("--held-out", type=int, default=8192)
    add("--steps", type=int, default=121, help="of each training; the last is profiled, not timed")
    add("--per-round", type=int, default=10)
    add("--threads", type=int, default=2)
    add("--d-model", type=int, default=576)
    add("--d-dict", type=int, default=4608)
    add("--k", type=int, default=32)
    add("--batch", type=int, default=4096)
    add("--seed", type=int, default=0)
    add("--only", nargs="+", help="contestants whose name contains one of these words")
    add(
        "--sweep",
        nargs="+",
        type=float,
        default=[1.0],
        help="factors of each one's learning rate, tried in turn",
    )
    add("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.steps <= asked.per_round or (asked.steps - 1) % asked.per_round:
        parser.error(
            f"--steps is {asked.steps}, which is not one more than a multiple of --per-round {asked.per_round}"
        )
    return asked


def main() -> None:
    """Race, print the table and what it says of the targets, write JSON."""
    asked = arguments()
    chosen = [c for c in CONTESTANTS if not asked.only or any(word in c.name for word in asked.only)]
    chosen = present(chosen)
    x = np.load(asked.data) if asked.data else synthetic(asked.rows, asked.d_model, asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.f32"
        held_out = prepare(x, asked.held_out, asked.seed, path)
        settings = {
            name: getattr(asked, name) for name in ("threads", "d_dict", "k", "batch", "seed", "steps")
        }
        settings |= {"data": str(path), "d_model": x.shape[1], "rows": len(x) - asked.held_out}
        settings |= {"warmup": 0.05, "decay": 0.2, "dead_after": 30_000}
        settings["rows"] = path.stat().st_size // (4 * x.shape[1])
        del x
        found: list[Measured] = []
        for factor in asked.sweep:
            at = [
                replace(c, rate=c.rate * factor)
                for c in chosen
                if c.name != FLOOR or factor == asked.sweep[0]
            ]
            tried = list(race(at, settings, asked.per_round, held_out))
            print(table(tried), flush=True)
            found += tried
    if OURS in {c.name for c in chosen}:
        print(*verdicts(found[: len(chosen)], found), sep="\n")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [vars(m) | {"contestant": vars(m.contestant)} for m in found]
    asked.out.write_text(json.dumps({"settings": settings, "found": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

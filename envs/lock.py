"""Write the lock files and the conda environment from the packages installed beside this interpreter.

`make lock` runs it in a fresh environment that holds the newest packages `pyproject.toml` allows.
Runtime and development packages are told apart by following each requirement to what it requires in turn.
"""

import re
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
HEADER = "# Written by `make lock`; do not edit. "
CONDA = """channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def canonical(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Name → pinned version of everything the requirements need on this platform.

    Torch's accelerator libraries are left to pip: they differ between its builds, as do local versions (+cpu).
    """
    pins: dict[str, str] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonical(requirement.name)
        if name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue
        pins[name] = metadata.version(name).split("+")[0]
        for wanted in ("", *sorted(requirement.extras)):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in metadata.requires(name) or []]
    return dict(sorted(pins.items()))


def pinned(pins: dict[str, str]) -> list[str]:
    """Lines of a requirements file."""
    return [f"{name}=={version}" for name, version in pins.items()]


def write_lock(file: str, pins: dict[str, str], note: str) -> None:
    """Write one requirements file below the repository root."""
    (ROOT / file).write_text("\n".join([HEADER + note, *pinned(pins), ""]))


def conda_environment(pins: dict[str, str]) -> str:
    """The environment for `snakemake --sdm conda`: Python from conda, everything else as pinned."""
    head = f"{HEADER}The pins of requirements.lock.\n{CONDA}"
    return head + "".join(f"      - {pin}\n" for pin in pinned(pins))


def main() -> None:
    """Write `requirements.lock`, `requirements-dev.lock` and `envs/circuitflow.yaml`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime = closure(project["dependencies"])
    everything = closure([*project["dependencies"], *project["optional-dependencies"]["dev"]])
    development = {name: version for name, version in everything.items() if name not in runtime}
    write_lock("requirements.lock", runtime, "What a run needs.")
    write_lock("requirements-dev.lock", development, "What tests and checks need besides.")
    (ROOT / "envs" / "circuitflow.yaml").write_text(conda_environment(runtime))


if __name__ == "__main__":
    main()

"""The lock files, the project's own requirements and the conda environment say the same."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("requirements.lock", "requirements-dev.lock")


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


@pytest.mark.parametrize("file", LOCKS)
def test_a_lock_holds_exact_public_versions_only(file: str) -> None:
    lines = (ROOT / file).read_text().splitlines()[1:]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])


@pytest.mark.parametrize("file", LOCKS)
def test_accelerator_libraries_are_left_to_torch(file: str) -> None:
    assert [name for name in pins(file) if name.startswith(("nvidia", "cuda", "triton"))] == []


@pytest.mark.parametrize(
    ("requirements", "locks"),
    [
        (PROJECT["project"]["dependencies"], LOCKS[:1]),
        (PROJECT["project"]["optional-dependencies"]["dev"], LOCKS),
        (PROJECT["build-system"]["requires"], LOCKS[:1]),
    ],
    ids=["run", "dev", "build"],
)
def test_requirements_are_pinned_within_their_bounds(requirements: list[str], locks: tuple[str, ...]) -> None:
    pinned = {name: version for file in locks for name, version in pins(file).items()}
    for text in requirements:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


def test_nothing_is_pinned_twice() -> None:
    assert set(pins(LOCKS[0])) & set(pins(LOCKS[1])) == set()


def test_the_conda_environment_has_the_pins_of_the_lock() -> None:
    dependencies = yaml.safe_load((ROOT / "envs" / "circuitflow.yaml").read_text())["dependencies"]
    python, pip, installed = dependencies
    assert pip == "pip"
    assert dict(pin.split("==") for pin in installed["pip"]) == pins(LOCKS[0])
    required = PROJECT["project"]["requires-python"]
    assert Requirement(f"python{required}").specifier.contains(python.split("=")[1] + ".0")

"""Stale locks: removed when their owner is dead, respected when it lives."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from circuitflow.errors import UserError
from circuitflow.locking import OWNER, record_owner, unlock_stale


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    (tmp_path / ".snakemake/locks").mkdir(parents=True)
    (tmp_path / ".snakemake/locks/0.output.lock").touch()
    return tmp_path


def write_owner(folder: Path, **changes: object) -> None:
    owner = {"pid": 1, "created": psutil.Process(1).create_time(), "host": socket.gethostname(), **changes}
    (folder / ".snakemake" / OWNER).write_text(json.dumps(owner))


def test_a_dead_owners_lock_goes(locked: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_owner(locked, pid=process.pid, created=psutil.Process(process.pid).create_time())
    with pytest.raises(UserError, match=f"process {process.pid}"):
        unlock_stale(locked)
    process.kill()
    process.communicate()
    assert unlock_stale(locked)
    assert not list((locked / ".snakemake/locks").iterdir())
    assert not unlock_stale(locked)


def test_a_reused_process_number_is_not_the_owner(locked: Path) -> None:
    write_owner(locked, created=12.0)
    assert unlock_stale(locked)


def test_a_lock_of_another_host_stays(locked: Path) -> None:
    write_owner(locked, host="elsewhere")
    with pytest.raises(UserError, match="a run on elsewhere"):
        unlock_stale(locked)


def test_a_lock_without_owner_goes_when_nothing_runs_here(locked: Path) -> None:
    assert unlock_stale(locked)


def test_the_owner_is_written_down(tmp_path: Path) -> None:
    record_owner(tmp_path / ".snakemake")
    owner = json.loads((tmp_path / ".snakemake" / OWNER).read_text())
    assert owner["pid"] == psutil.Process().pid

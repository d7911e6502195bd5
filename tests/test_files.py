"""Temporary files: named by host and process, and removed where the process was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from energyreg.cli.console import check_writable
from energyreg.files import remove_abandoned, temporary_path, write_atomically
from energyreg.tables.files import TableWriter

KILLED = """
import os, signal, sys
from pathlib import Path
from energyreg.files import temporary_path
temporary_path(Path(sys.argv[1])).write_bytes(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def abandoned(tmp_path: Path) -> Path:
    """A file beside which a process that was killed has left a half of it."""
    path = tmp_path / "model [1].safetensors"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    return path


@pytest.mark.parametrize("kind", ["write", "check", "table"])
def test_what_a_killed_process_left_is_removed_by_the_next(kind: str, abandoned: Path) -> None:
    if kind == "write":
        write_atomically(abandoned, b"whole")
    elif kind == "check":
        check_writable(abandoned)
    else:
        left = next(abandoned.parent.iterdir())
        table = abandoned.with_name("table.csv")
        left.rename(left.with_name(left.name.replace(abandoned.name, table.name)))
        with TableWriter(table):
            pass
    assert not list(abandoned.parent.glob(".*"))


def test_files_of_running_processes_and_of_other_hosts_stay(tmp_path: Path) -> None:
    path = tmp_path / "model"
    mine = temporary_path(path)
    host, process, token = mine.name.removesuffix(".tmp").rsplit("-", 2)
    others = [mine, mine.with_name(f"{host}x-999999999-{token}.tmp"), mine.with_name(f".other.h-{process}-{token}.tmp")]
    for other in others:
        other.write_bytes(b"")
    remove_abandoned(path)
    assert all(other.exists() for other in others)


def test_a_full_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("energyreg.files.reserve", full)
    with pytest.raises(OSError, match="the disk is full"):
        check_writable(tmp_path / "model")
    assert not list(tmp_path.iterdir())

"""Measurements in a process of their own: a function of this package, called there, that returns JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows import Skipped

__all__ = ["ROOT", "call", "environment"]

ROOT = Path(__file__).parent.parent

CALL = """
import importlib, json, sys
module, name, arguments = json.loads(sys.argv[1])
print("\\n" + json.dumps(getattr(importlib.import_module(module), name)(*arguments)))
"""


def environment(threads: int | None = None) -> dict[str, str]:
    """This process's environment, with the root of the repository to import from."""
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    threads_only = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **threads_only}


def call(module: str, name: str, *arguments: Any, threads: int | None = None) -> Any:
    """What a function returns in a new interpreter.

    Raises:
        Skipped: If it fails there; the reason is the last line that it wrote.
    """
    command = [sys.executable, "-c", CALL, json.dumps([module, name, arguments])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(threads), cwd=ROOT)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise Skipped(f"{name} failed: {lines[-1]}")
    return json.loads(result.stdout.strip().splitlines()[-1])

"""What one waits for before anything happens: the import, a saved model, `make demo` in a fresh copy."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import energyreg as er
from benchmarks.children import ROOT, environment
from benchmarks.rows import Benchmark, Measurement, Options, Skipped
from benchmarks.steps import FEATURES
from benchmarks.timing import paired

__all__ = ["BENCHMARKS"]


IMPORT = """
import time
start = time.perf_counter()
import numpy, torch
there = time.perf_counter()
import energyreg
energyreg.fit, energyreg.EnergyRegressionModel  # names are imported when they are first used
print(there - start, time.perf_counter() - there)
"""


def _import(options: Options) -> Measurement:
    runs = []
    for _ in range(options.size(7, quick=3, tiny=1)):
        result = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, env=environment(), cwd=ROOT
        )
        runs.append([float(part) for part in result.stdout.split()])
    torchs, own = (statistics.median(column) for column in zip(*runs, strict=True))
    return Measurement(own, seconds={"energyreg": own, "torch": torchs}, details={"runs": len(runs)})


HELP = [sys.executable, "-m", "energyreg", "--help"]


def _help(options: Options) -> Measurement:
    """The command line's help, and the start of Python alone."""

    def seconds(command: list[str]) -> float:
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True, env=environment(), cwd=ROOT)
        return time.perf_counter() - started

    runs = [(seconds([sys.executable, "-c", ""]), seconds(HELP)) for _ in range(options.size(7, quick=3, tiny=1))]
    python, whole = (statistics.median(column) for column in zip(*runs, strict=True))
    return Measurement(whole - python, seconds={"help": whole, "python": python}, details={"runs": len(runs)})


def _load(options: Options) -> Measurement:
    torch.manual_seed(0)
    model = er.EnergyRegressionModel.for_table(FEATURES, width=options.size(256, tiny=16))
    model.fit_preprocessing(torch.randn(256, FEATURES), torch.randn(256, 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        er.save(model.eval(), path)
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else Path(folder).rglob("*")))
        times = paired({"load": lambda: er.load(path), "build": lambda: er.EnergyRegressionModel.for_table(FEATURES)},
                       options.rounds)  # fmt: skip
    seconds = {name: times.median(name) for name in ("load", "build")}
    ratio = times.ratio("load", "build").median
    return Measurement(1e3 * seconds["load"], None, ratio, seconds, {"MiB": round(size / 2**20, 2)})


def _demo(options: Options) -> Measurement:
    """`make demo` in a copy of the files that git knows, so with an environment of its own to make."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
        seconds = {}
        for part in ("install", "demo"):
            started = time.perf_counter()
            result = subprocess.run(["make", part], cwd=folder, env=clean, capture_output=True, text=True)
            seconds[part] = time.perf_counter() - started
            if result.returncode:
                raise Skipped(f"make {part} failed: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    return Measurement(sum(seconds.values()), seconds=seconds)


BENCHMARKS = [
    Benchmark(
        "import", "`import energyreg` and its core, over the import of torch", "≤ 0.2 s", _import, 0.2,
        format="{:.3f} s", once=True,
    ),
    Benchmark(
        "help", "`energyreg --help` over the start of Python", "none set", _help, format="{:.2f} s", once=True,
    ),
    Benchmark(
        "load", "`er.load` of the default model", "none set", _load, format="{:.1f} ms", guarded="ratio", once=True,
    ),
    Benchmark(
        "demo", "`make demo` in a fresh copy: environment, three trainings, report", "≤ 300 s", _demo, 300,
        format="{:.0f} s", once=True, long=True, asked=True,
    ),
]  # fmt: skip

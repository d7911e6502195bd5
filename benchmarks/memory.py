"""Peak memory, of training and of predictions, each in a process of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import energyreg as er
from benchmarks.children import call
from benchmarks.rows import Benchmark, Measurement, Options, Skipped

__all__ = ["BENCHMARKS", "prediction_peak", "training_peak"]

MIB = 2**20
BUDGET = 512
"""MiB above the model and the data that predictions may take."""


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _reset_peak() -> int:
    """Let the peak of the resident memory start from what is resident now; return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def training_peak(kind: str, tiny: bool, device: str) -> dict[str, float]:
    """Bytes of tensors alive at once in a training: weights, gradients, moments, and what a step keeps.

    Args:
        kind: "separable" or "mixture".
        tiny: Whether a small model will do.
        device: Where it trains.
    """
    from benchmarks.steps import FEATURES, training_step

    options = Options(tiny=tiny, device=device)

    def prepare(width: int) -> tuple[Callable[[], object], int]:
        torch.manual_seed(0)
        make = er.EnergyRegressionModel
        if kind == "separable":
            model = make.for_table(FEATURES, width=width)
        else:
            model = make.mixture_for_table(FEATURES, num_components=8, width=width)
        step = training_step(model, model.default_objective(), 16 if tiny else 256, options)
        return step, sum(parameter.nbytes for parameter in model.parameters())

    warm_up, _ = prepare(8)  # what is loaded at the first use is not the model's
    warm_up()
    step, weights = prepare(16 if tiny else 256)

    def train() -> None:
        for _ in range(3):
            step()

    # The first step makes the gradients and the optimiser's moments, so that they are counted.
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        train()
        return {"tensors": torch.cuda.max_memory_allocated(device) - before + weights}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        train()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    alive = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"]):
        alive += int(event["args"]["Bytes"])
        peak = max(peak, alive)
    return {"tensors": peak + weights}


def prediction_peak(question: str, rows: int, tiny: bool) -> float:
    """Resident bytes at the peak of a prediction above those with model and data."""
    from benchmarks import predictions

    model, x, y = predictions.trained("energy", rows, tiny)
    ask = getattr(predictions, question)
    ask(model, x[:64], y[:64])
    before = _reset_peak()
    ask(model, x, y)
    return float(_status("VmHWM") - before)


def _require_linux() -> None:
    if not Path("/proc/self/clear_refs").exists():
        raise Skipped("peak memory is read from /proc, which is not here")


def _training(options: Options) -> Measurement:
    peaks: dict[str, Any] = {
        kind: call("benchmarks.memory", "training_peak", kind, options.tiny, options.device)
        for kind in ("separable", "mixture")
    }
    details = {kind: f"{peak['tensors'] / MIB:.1f} MiB" for kind, peak in peaks.items()}
    return Measurement(peaks["separable"]["tensors"] / peaks["mixture"]["tensors"], details=details)


def _prediction(question: str, options: Options) -> Measurement:
    _require_linux()
    if options.device != "cpu":
        raise Skipped("measured on the CPU only")
    rows = options.size(1_000_000, quick=50_000, tiny=256)
    peak = call("benchmarks.memory", "prediction_peak", question, rows, options.tiny, threads=torch.get_num_threads())
    return Measurement(peak / MIB, details={"rows": rows})


BENCHMARKS = [
    Benchmark(
        "memory-training", "peak of a training's tensors, separable head, against a mixture with K = 8", "≤ 1.5 ×",
        _training, 1.5, guarded="value", once=True,
    ),
    Benchmark(
        "memory-log-prob", "`log_prob` of 1,000,000 rows, above model and data", "≤ 512 MiB",
        partial(_prediction, "log_prob"), BUDGET, format="{:.0f} MiB", once=True,
    ),
    Benchmark(
        "memory-interval", "mean and 90 % interval of 1,000,000 rows, above model and data", "≤ 512 MiB",
        partial(_prediction, "mean_and_interval"), BUDGET, format="{:.0f} MiB", once=True,
    ),
]  # fmt: skip

"""Works through the list of settings, block of seeds by block of seeds; a result that is there is not made again."""

from __future__ import annotations

import ctypes
import datetime
import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from energyreg.cli.demo import describe_machine
from experiments.claims import do_each, in_processes
from experiments.one_dimensional.training import Papers, Result, Setting

__all__ = ["RESULTS", "run", "select"]

RESULTS = Path(__file__).parent / "results"

Block = tuple[Setting, list[int]]


def select(settings: Sequence[Setting], pattern: str) -> list[Setting]:
    """Settings whose name matches one of some shell patterns, parted by commas."""
    return [setting for setting in settings if any(fnmatch(setting.name, p) for p in pattern.split(","))]


def blocks(settings: Sequence[Setting], seeds: int | None = None) -> list[Block]:
    """All pieces of work in order: the first block of every setting, cheap ones first, then the second of every one."""
    work = []
    for setting in settings:
        count = setting.seeds if seeds is None else min(setting.seeds, seeds)
        for start in range(0, count, setting.block):
            # Blocks stay whole whatever --seeds says, for the samples of a block come from one generator.
            work.append((setting, list(range(start, min(start + setting.block, setting.seeds)))))
    return sorted(work, key=lambda item: (item[1][0] // item[0].block, item[0].seconds))


def _numbers(values: Any) -> Any:
    """Lists of numbers with None for what is not finite, which JSON cannot say."""
    if isinstance(values, list):
        return [value if not isinstance(value, float) or math.isfinite(value) else None for value in values]
    return values


def _record(setting: Setting, seeds: list[int], result: Result, seconds: float) -> dict[str, Any]:
    scores = {"kl": result.model.kl, "test_nll": result.model.test_nll}
    if result.proposal is not None:
        scores |= {"proposal_kl": result.proposal.kl, "proposal_test_nll": result.proposal.test_nll}
    training: dict[str, Any] = {}
    if isinstance(setting, Papers):
        training = {"epochs": setting.epochs, "batch": setting.batch, "learning_rate": setting.learning_rate,
                    "objective": repr(setting.objective(setting.samples))}  # fmt: skip
    return {
        "setting": setting.name, "task": setting.task, "method": setting.method, "samples": setting.samples,
        **training, "seeds": seeds, **{name: _numbers(values) for name, values in scores.items()},
        "train_loss": _numbers(result.train_loss), "diverged": result.diverged, **result.notes,
        "seconds": round(seconds, 1), "torch": torch.__version__, "cpu": describe_machine()["processor"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip


def _keep_memory() -> None:
    """Keep freed memory in the process: to get each tensor's from the system again takes a quarter of the time."""
    with suppress(OSError, AttributeError):  # other systems than Linux with glibc
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)
        libc.mallopt(mmap_threshold, 2**30)


def _work(work: list[Block], results: Path) -> bool:
    """Do all that is not done and that no other process is doing; return whether nothing went wrong."""
    torch.set_num_threads(1)
    _keep_memory()

    def path_of(block: Block) -> Path:
        setting, seeds = block
        return results / setting.name / f"{seeds[0]:02}-{seeds[-1]:02}.json"

    def one(block: Block) -> tuple[str, str]:
        setting, seeds = block
        started = time.perf_counter()
        result = setting.run(seeds)
        record = _record(setting, seeds, result, time.perf_counter() - started)
        if seeds[0] == 0:
            np.savez_compressed(path_of(block).parent / "density.npz", log_density=result.model.picture)
        return json.dumps(record, indent=1) + "\n", "D_KL " + ", ".join(f"{value:.3f}" for value in result.model.kl)

    return do_each(work, path_of, lambda block: f"{block[0].name} {path_of(block).stem}", one)


def run(settings: Sequence[Setting], results: Path = RESULTS, seeds: int | None = None, jobs: int = 1) -> bool:
    """Make all results that are not there.

    Several of these may run at the same time, on the same folder; each piece of work is done once.

    Args:
        settings: What to do.
        results: Folder of results.
        seeds: How many seeds of each setting; all by default.
        jobs: Processes, of one thread each.

    Returns:
        Whether every piece of work was done.
    """
    return in_processes(partial(_work, blocks(settings, seeds), results), jobs)

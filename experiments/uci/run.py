"""Works through tables, splits and methods; a result that is there is not made again."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import math
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from energyreg.cli.demo import describe_machine
from experiments.claims import do_each, in_processes
from experiments.uci.data import Split, Table, load
from experiments.uci.methods import Method, Outcome

__all__ = ["RESULTS", "run", "work"]

RESULTS = Path(__file__).parent / "results"
LEVEL = 0.9

Piece = tuple[Table, Method, int]


def work(tables: Sequence[Table], methods: Sequence[Method], splits: int) -> list[Piece]:
    """All pieces of work in order: the first split of every table by every method, then the second, and so on."""
    return [
        (table, method, index)
        for index in range(splits)
        for table in tables
        for method in methods
        if index < min(table.splits, method.splits or table.splits)
    ]


def path_of(piece: Piece, results: Path) -> Path:
    """File of a result."""
    table, method, index = piece
    return results / table.name / method.name / f"{index:02}.json"


def _score(method: Method, outcome: Outcome, split: Split) -> dict[str, Any]:
    x, y = split.x_test, split.y_test
    if method.test_rows is not None and len(y) > method.test_rows:
        chosen = np.random.default_rng(0).permutation(len(y))[: method.test_rows]
        x, y = x[chosen], y[chosen]
    started = time.perf_counter()
    forecast = outcome.predict(x)
    nll, crps, mean, interval = forecast.nll(y), forecast.crps(y), forecast.mean(), forecast.interval(LEVEL)
    seconds = time.perf_counter() - started
    inside = (interval[:, 0] <= y) & (y <= interval[:, 1])
    return {
        "nll": nll if nll is None or math.isfinite(nll) else None,
        "crps": crps,
        "rmse": float(np.sqrt(np.mean((mean - y) ** 2))),
        "coverage": float(inside.mean()),
        "width": float((interval[:, 1] - interval[:, 0]).mean()),
        "diverged": nll is not None and not math.isfinite(nll),
        "test_rows": len(y),
        "predict_seconds": round(seconds, 2),
    }


def _do(piece: Piece, folder: Path) -> dict[str, Any]:
    table, method, index = piece
    split = load(table, index, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the rivals' own code, hundreds of lines
        outcome = method.run(split, seed=index)
        scores = _score(method, outcome, split)
    versions = {name: importlib.metadata.version(name) for name in ("torch", *method.needs)}
    return {
        "table": table.name, "method": method.name, "split": index, **scores,
        "fit_seconds": round(outcome.seconds, 2), "tuning_seconds": round(outcome.tuning_seconds, 2),
        "setting": outcome.setting, "train_rows": len(split.y), "versions": versions,
        "cpu": describe_machine()["processor"], "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip


def _work(pieces: Sequence[Piece], folder: Path, results: Path) -> bool:
    """Do all that is not done and that no other process is doing; return whether nothing went wrong."""
    import torch

    torch.set_num_threads(1)

    def one(piece: Piece) -> tuple[str, str]:
        record = _do(piece, folder)
        nll = "-" if record["nll"] is None else f"{record['nll']:.3f}"
        return json.dumps(record, indent=1) + "\n", f"NLL {nll}, CRPS {record['crps']:.4g}"

    def name(piece: Piece) -> str:
        return f"{piece[0].name} {piece[1].name} {piece[2]:02}"

    return do_each(pieces, lambda piece: path_of(piece, results), name, one)


def run(pieces: Sequence[Piece], folder: Path, results: Path = RESULTS, jobs: int = 1) -> bool:
    """Make all results that are not there.

    Several of these may run at the same time, on the same folder; each piece of work is done once. A method whose
    package is not installed is left out, and said so.

    Args:
        pieces: What to do.
        folder: Folder of the data.
        results: Folder of results.
        jobs: Processes, of one thread each.

    Returns:
        Whether every piece of work was done.
    """
    missing = {
        need: method.name for _, method, _ in pieces for need in method.needs if importlib.util.find_spec(need) is None
    }
    for need, name in missing.items():
        print(f"{need} is not installed: {name} is left out. Install experiments/uci/requirements.txt.", flush=True)
    pieces = [piece for piece in pieces if not set(piece[1].needs) & set(missing)]
    return in_processes(partial(_work, list(pieces), folder, results), jobs) and not missing

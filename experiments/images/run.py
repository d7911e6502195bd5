"""Works through tasks, seeds and methods; a result that is there is not made again."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import energyreg as er
from energyreg.cli.demo import describe_machine
from experiments.claims import do_each, in_processes
from experiments.images.data import Fold, Task
from experiments.images.methods import Method
from experiments.images.scores import judge, picture

__all__ = ["RESULTS", "path_of", "run", "work"]

RESULTS = Path(__file__).parent / "results"
PICTURED = ("gaussian", "mixture", "ours-tuned")
"""Methods whose densities are kept for the pictures, of the first seed."""

Piece = tuple[Task, Method, int]


def work(tasks: Sequence[Task], methods: Sequence[Method], seeds: int) -> list[Piece]:
    """All pieces of work in order: the first seed of every task by every method, then the second, and so on."""
    return [
        (task, method, seed)
        for seed in range(seeds)
        for method in methods
        for task in tasks
        if seed < task.seeds and method.suits(task)
    ]


def path_of(piece: Piece, results: Path) -> Path:
    """File of a result."""
    task, method, seed = piece
    return results / task.name / method.name / f"{seed}.json"


def do(piece: Piece, fold: Fold) -> dict[str, Any]:
    """Train and judge: a record for JSON."""
    task, method, seed = piece
    names = {"task": task.name, "method": method.name, "seed": seed}
    try:
        outcome = method.fit(task, fold.split, seed)
    except er.TrainingError as error:  # of this method on these rows, which is a result
        return {**names, "nll": None, "validation_nll": None, "diverged": True, "error": str(error)}
    record = {
        **names, **judge(outcome, fold),
        "fit_seconds": round(outcome.seconds, 2), "setting": outcome.setting,
        "validation_nll": outcome.validation_nll, "train_rows": len(fold.split.y),
        "validation_rows": len(fold.split.y_validation), "torch": torch.__version__,
        "cpu": describe_machine()["processor"], "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
    if fold.ridge is not None:
        record["ridge"] = list(fold.ridge)
    if seed == 0 and method.name in PICTURED:
        record["picture"] = picture(outcome, fold)
    return record


def _work(pieces: Sequence[Piece], data: Path, cache: Path, results: Path) -> bool:
    """Do all that is not done and that no other process is doing; return whether nothing went wrong."""
    torch.set_num_threads(1)
    folds: dict[tuple[str, int], Fold] = {}

    def one(piece: Piece) -> tuple[str, str]:
        nonlocal folds
        task, _, seed = piece
        if (task.name, seed) not in folds:
            folds = {key: fold for key, fold in folds.items() if key[1] == seed}
            folds[task.name, seed] = task.load(data, cache, seed)
        record = do(piece, folds[task.name, seed])
        scores = "diverged" if record["nll"] is None else f"NLL {record['nll']:.3f}, MAE {record['mae']:.4g}"
        return json.dumps(record) + "\n", scores

    return do_each(
        pieces, lambda piece: path_of(piece, results), lambda piece: f"{piece[0].name} {piece[1].name} {piece[2]}", one
    )


def run(pieces: Sequence[Piece], data: Path, cache: Path, results: Path = RESULTS, jobs: int = 1) -> bool:
    """Make all results that are not there; several of these may run at once on the same folder.

    Args:
        pieces: What to do.
        data: Folder of the data.
        cache: Folder of features.
        results: Folder of results.
        jobs: Processes, of one thread each.

    Returns:
        Whether every piece of work was done.
    """
    return in_processes(partial(_work, list(pieces), data, cache, results), jobs)

"""Results of experiments: read from their folders, averaged with standard errors, and written as a page of tables."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from energyreg.files import write_atomically

__all__ = ["Record", "Records", "common", "digits_for", "mark", "mean_and_error", "read", "standard_error",
           "write_page"]  # fmt: skip

Record = dict[str, Any]
Records = dict[tuple[str, str], dict[int, Record]]
"""Results by task and method, then by repetition: a seed, a fold, a split."""


def read(results: Path, task: str, repetition: str) -> Records:
    """Read RESULTS/TASK/METHOD/REPETITION.json; records of other experiments in the folder are left out.

    Args:
        results: Folder of results.
        task: Key of a record that names its task: "task", "set", "table".
        repetition: Key of a record that numbers its repetition: "seed", "fold", "split".
    """
    records: Records = defaultdict(dict)
    for path in sorted(results.glob("*/*/*.json")):
        record = json.loads(path.read_text())
        if {task, "method", repetition} <= set(record):
            records[record[task], record["method"]][record[repetition]] = record
    return dict(records)


def common(records: Records, task: str, *methods: str) -> list[int]:
    """Repetitions that all of these methods have."""
    return sorted(set.intersection(*(set(records.get((task, method), ())) for method in methods)))


def standard_error(scores: np.ndarray) -> float:
    """Standard error of the mean; not a number where there are less than two scores."""
    return float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else math.nan


def mean_and_error(scores: np.ndarray, digits: int = 3, sign: str = "") -> str:
    """The mean with its standard error; nothing where a score is missing, "diverged" where one is infinite."""
    if not len(scores) or np.isnan(scores).any():
        return ""
    if not np.isfinite(scores).all():
        return "diverged"
    text = f"{scores.mean():{sign}.{digits}f}"
    return text if len(scores) < 2 else f"{text} ± {standard_error(scores):.{digits}f}"


def digits_for(scores: Sequence[float], most: int) -> int:
    """Digits behind the point, 1 to `most`, that show three figures of the smallest score."""
    least = min((abs(score) for score in scores if math.isfinite(score) and score), default=1.0)
    return min(max(2 - math.floor(math.log10(least)), 1), most)


def mark(reached: bool, known: bool = True) -> str:
    """What a verdict says of a target."""
    return "reached" if reached else "missed" if known else "not known"


def write_page(results: Path, lines: Sequence[str]) -> None:
    """Write README.md into the folder of results."""
    path = results / "README.md"
    write_atomically(path, "\n".join(lines).encode())
    print(f"Wrote {path}.")

"""The rows of the table, in order, and what becomes of their figures: JSON, Markdown, the guard's verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import large_data, memory, predictions, refinement, roi_pool, shared_samples, startup, steps, trainings
from benchmarks.rows import Benchmark
from energyreg.files import write_atomically

__all__ = ["BENCHMARKS", "RESULTS", "guarded_ratio", "markdown", "merge", "read", "select", "verdict", "write"]

BENCHMARKS: list[Benchmark] = [
    *(row for row in steps.BENCHMARKS if not row.name.startswith("growth")),
    *shared_samples.BENCHMARKS,
    *trainings.BENCHMARKS,
    *predictions.BENCHMARKS[:2],
    *memory.BENCHMARKS,
    *large_data.BENCHMARKS,
    *roi_pool.BENCHMARKS,
    *refinement.BENCHMARKS,
    *(row for row in steps.BENCHMARKS if row.name.startswith("growth")),
    *predictions.BENCHMARKS[2:],
    *startup.BENCHMARKS,
]
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1.3
"""How many times worse than the committed one a ratio may be."""

Row = dict[str, Any]


def select(pattern: str | None, quick: bool = False) -> list[Benchmark]:
    """Benchmarks by shell patterns, parted by commas; without one all that are not long (quick) or only on request."""
    if pattern is not None:
        return [row for row in BENCHMARKS if any(fnmatch(row.name, part) for part in pattern.split(","))]
    return [row for row in BENCHMARKS if not row.asked and not (quick and row.long)]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["name"], row["threads"], row["device"]


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows, the new in place of the old ones of the same name, threads and device, in the table's order."""
    rows = {_key(row): row for row in [*old, *new]}
    order = {benchmark.name: place for place, benchmark in enumerate(BENCHMARKS)}
    return sorted(rows.values(), key=lambda row: (order.get(row["name"], len(order)), row["device"], row["threads"]))


def read(folder: Path) -> list[Row]:
    """Rows of a folder of results; none where there is no file."""
    path = folder / "benchmarks.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write `benchmarks.json` and the table in `README.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"rows": [_finite(row) for row in rows]}, indent=1, ensure_ascii=False)
    write_atomically(folder / "benchmarks.json", (text + "\n").encode())
    write_atomically(folder / "README.md", markdown(rows).encode())


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The table ------------------------------------------------------------------------------------------------------------


def _mark(row: Row) -> str:
    if "skipped" in row:
        return "skipped"
    return {True: "yes", False: "**no**", None: "–"}[row["met"]]


def _figure(row: Row) -> str:
    if "skipped" in row:
        return "–"
    text = row["text"]
    if row.get("quartiles") and row["name"] != "toy1":
        unit = {"×": "{:.2f}", "rows/s": "{:,.0f}"}.get(text.split()[-1], "{:.2f}")
        low, high = (unit.format(value) for value in row["quartiles"])
        text += f" ({low} – {high})"
    return text + (" (quick)" if row["quick"] else "")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if value is None or isinstance(value, bool):
        return {None: "never", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "never"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def markdown(rows: Sequence[Row]) -> str:
    """The table, and below it what is known of each figure."""
    setups: dict[str, str] = {}
    for row in rows:
        where = row.get("gpu") if row["device"].startswith("cuda") else row.get("processor")
        setup = f"{where}, {row.get('cores')} cores, PyTorch {row['torch']}, {row.get('date')}"
        setups[setup] = setups.get(setup, "") + f"{row['name']} "
    lines = [
        "# Speed and memory",
        "",
        "Written by `python -m benchmarks`; [how to read it](../README.md). Ratios are medians over the rounds of one",
        "run, their quartiles in parentheses.",
        "",
    ]
    if len(setups) == 1:
        lines += [f"Measured on {next(iter(setups))}.", ""]
    elif setups:
        lines += ["Measured on:", ""]
        lines += [f"- {setup}: {', '.join(dict.fromkeys(names.split()))}" for setup, names in setups.items()] + [""]
    lines += ["| | work | threads | target | figure | met |", "|---|---|---:|---|---|---|"]
    for row in rows:
        where = str(row["threads"]) if row["device"] == "cpu" else row["device"]
        cells = (f"`{row['name']}`", row["work"], where, row["target"], _figure(row), _mark(row))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Details", "", "Absolute times are for information; nothing compares them.", ""]
    for row in rows:
        where = f"{row['threads']} thread{'s' * (row['threads'] > 1)}" if row["device"] == "cpu" else row["device"]
        if "skipped" in row:
            parts = [f"skipped: {row['skipped']}"]
        else:
            parts = [f"{name} {_duration(value)}" for name, value in row["seconds"].items()]
            parts += [f"{name} {_value(value)}" for name, value in row["details"].items()]
        lines.append(f"- `{row['name']}`, {where}: {'; '.join(parts)}.")
    return "\n".join(lines) + "\n"


# The guard ------------------------------------------------------------------------------------------------------------


def guarded_ratio(row: Row) -> tuple[float, str] | None:
    """What the guard compares in a row, and whether higher or lower is better; None where there is nothing."""
    if "skipped" in row or row["guarded"] == "nothing":
        return None
    if row["guarded"] == "value":
        return row["value"], row["better"]
    return (row["ratio"], "lower") if row["ratio"] is not None else None


def verdict(committed: Row, now: Row, tolerance: float = TOLERANCE) -> str | None:
    """A line on what has become worse, or None.

    Args:
        committed: The row as it is in the results.
        now: The same row, measured again.
        tolerance: How many times worse it may be.
    """
    before, after = guarded_ratio(committed), guarded_ratio(now)
    if before is None:
        return None
    where = f"{committed['name']}, {committed['threads']} thread(s), {committed['device']}"
    if after is None:
        return f"{where}: was {before[0]:.2f}, cannot be measured now: {now.get('skipped', 'no ratio')}"
    factor = before[0] / after[0] if before[1] == "higher" else after[0] / before[0]
    if factor <= tolerance:
        return None
    return (
        f"{where}: {after[0]:.2f} × now, {before[0]:.2f} × committed ({before[1]} is better): "
        f"{100 * (factor - 1):.0f} % worse, {100 * (tolerance - 1):.0f} % allowed"
    )

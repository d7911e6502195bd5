"""Command line: `python -m experiments.several_outputs [--data FOLDER]` trains what is missing and prints the table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.several_outputs.run import METHODS, RESULTS, run
from experiments.several_outputs.tasks import TASKS


def table(results: Path) -> str:
    """A Markdown table for each task: means over the seeds."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    lines = []
    for task in TASKS:
        mine = [record for record in records if record["task"] == task]
        if not mine:
            continue
        lines += [
            f"### {task}: {mine[0]['rows']:,} rows to train on, {mine[0]['test_rows']:,} to judge by", "",
            "| method | seeds | NLL | KL from the truth | energy score | error of the mean | "
            "CPU seconds: fit | density | draws |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for method in METHODS:
            rows = [record for record in mine if record["method"] == method]
            if rows:
                lines.append(_row(method, rows))
        lines.append("")
    return "\n".join(lines)


def _row(method: str, rows: list[dict[str, Any]]) -> str:
    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    def spread(name: str) -> str:
        values = "/".join(f"{row[name]:.3f}" for row in rows)
        return f"{mean(name):.3f} ± {mean(name + '_se'):.3f} ({values})"

    cells = [
        method, str(len(rows)), spread("nll"), spread("kl") if "kl" in rows[0] else "", f"{mean('energy_score'):.4f}",
        f"{mean('mean_error'):.4f}", *(f"{mean(name):.0f}" for name in ("seconds_fit", "seconds_density",
        "seconds_draws")),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m experiments.several_outputs", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with biwi_train.npz, biwi_test.npz and their _frames.csv")
    parser.add_argument("--only", choices=list(TASKS), action="append", help="a task; all of them by default")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    complete = True
    if not arguments.report:
        arguments.results.mkdir(parents=True, exist_ok=True)
        complete = run(arguments.only or list(TASKS), arguments.seeds, arguments.data, arguments.results)
    print(table(arguments.results))
    return 0 if complete else 1


if __name__ == "__main__":
    raise SystemExit(main())

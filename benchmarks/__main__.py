"""Command line: `python -m benchmarks` measures the table, `python -m benchmarks guard` compares with the results."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.children import ROOT, environment
from benchmarks.rows import Options, Skipped
from benchmarks.table import RESULTS, guarded_ratio, markdown, merge, read, select, verdict, write
from energyreg.cli.demo import describe_machine


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure in this process, with one number of threads."""
    threads = int(arguments.threads)
    torch.set_num_threads(threads)
    # Numbers below 1e-38 take many times as long: they come from weights that no step of a real training has.
    torch.set_flush_denormal(True)
    machine = describe_machine()
    facts = {"processor": machine["processor"], "cores": machine["cores"],
             "date": datetime.datetime.now(datetime.UTC).date().isoformat()}  # fmt: skip
    if arguments.device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(arguments.device)
        facts["TF32"] = torch.get_float32_matmul_precision()
    options = Options(arguments.rounds, arguments.quick, arguments.tiny, arguments.device)
    rows = []
    for benchmark in select(arguments.only, arguments.quick):
        if benchmark.once and not arguments.first:
            continue
        started = time.perf_counter()
        try:
            row = benchmark.record(benchmark.measure(options), threads, options)
            said = row["text"]
        except Skipped as reason:
            row = benchmark.skipped(str(reason), threads, options)
            said = f"skipped: {reason}"
        except Exception as error:  # of one row; hours of others are not thrown away for it
            traceback.print_exc()
            row = benchmark.skipped(f"failed: {type(error).__name__}: {error}", threads, options)
            said = row["skipped"]
        rows.append(row | facts)
        seconds = time.perf_counter() - started
        print(f"{benchmark.name}, {threads} thread(s): {said}  [{seconds:.0f} s]", file=sys.stderr, flush=True)
    return rows


def measure_each(arguments: argparse.Namespace, threads: Sequence[int], only: str | None) -> list[dict[str, Any]]:
    """Measure in a new process for each number of threads."""
    rows: list[dict[str, Any]] = []
    for place, count in enumerate(threads):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks", "measure", "--threads", str(count), "--output", str(path),
                       "--rounds", str(arguments.rounds), "--device", arguments.device]  # fmt: skip
            command += ["--only", only] if only is not None else []
            command += [f"--{flag}" for flag in ("quick", "tiny") if getattr(arguments, flag)]
            command += ["--first"] if place == 0 else []
            result = subprocess.run(command, env=environment(count), cwd=ROOT)
            if result.returncode or not path.exists():
                raise SystemExit(f"The measurement with {count} thread(s) failed; its error is above.")
            rows += json.loads(path.read_text())
    return rows


def guard(arguments: argparse.Namespace) -> int:
    """Measure the committed ratios again; 1 if one is worse by more than the tolerance."""
    names = {benchmark.name for benchmark in select(arguments.only) if not benchmark.long}
    committed = [row for row in read(arguments.output or RESULTS)
                 if row["name"] in names and row["device"] == arguments.device and guarded_ratio(row)]  # fmt: skip
    if not committed:
        print("There is nothing to compare with: no committed row has a ratio for this device.", file=sys.stderr)
        return 2
    arguments.quick = all(row["quick"] for row in committed)
    pending, failures = committed, []
    # What looks worse is measured once more: another process may have disturbed it.
    for _ in range(2):
        failures = []
        for threads in sorted({row["threads"] for row in pending}):
            rows = [row for row in pending if row["threads"] == threads]
            now = {row["name"]: row for row in measure_each(arguments, [threads], ",".join(r["name"] for r in rows))}
            failures += [(row, line) for row in rows if (line := verdict(row, now[row["name"]])) is not None]
        pending = [row for row, _ in failures]
        if not pending:
            break
    for _, line in failures:
        print(line)
    print(f"{len(committed)} ratios compared, {len(failures)} worse.")
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("command", nargs="?", default="run", choices=["run", "guard", "list", "measure"],
                        help="run (the default), guard, or list the rows; `measure` is what run starts")  # fmt: skip
    parser.add_argument("--only", metavar="PATTERN", help="rows by name, e.g. 'joint-*,separable'; also long ones")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, each in a process of its own")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of paired timing")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; on cuda one number of threads is enough")
    parser.add_argument("--output", type=Path, help="folder of results; with --quick nothing is written by default")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, no trainings, 5 rounds: a look")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.command == "list":
        for benchmark in select(None) + [row for row in select("*") if row.asked]:
            when = "  (only on request)" if benchmark.asked else ""
            print(f"{benchmark.name:20} {benchmark.work}: {benchmark.target}{when}")
        return 0
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; expected at least 1.")
    if not all(part.isdigit() and int(part) for part in arguments.threads.split(",")):
        parser.error(f"--threads is {arguments.threads!r}; expected whole numbers, e.g. 1,2.")
    if not select(arguments.only):
        parser.error(f"--only {arguments.only} matches no row; `python -m benchmarks list` shows their names.")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("Skipped: there is no CUDA device here.", file=sys.stderr)
        return 0
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, 5)
    if arguments.command == "measure":
        arguments.output.write_text(json.dumps(measure(arguments)))
        return 0
    if arguments.command == "guard":
        return guard(arguments)
    rows = measure_each(arguments, [int(part) for part in arguments.threads.split(",")], arguments.only)
    failed = any(row.get("skipped", "").startswith("failed") for row in rows)
    if arguments.output is None and (arguments.quick or arguments.tiny):
        print(markdown(rows))
        return int(failed)
    folder = arguments.output or RESULTS
    rows = merge(read(folder), rows)
    write(folder, rows)
    print(f"Wrote {folder / 'benchmarks.json'} and {folder / 'README.md'}.")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())

"""Command line: `python -m experiments.images features`, `... run` and `... report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.command_line import add_inputs, add_results, add_run, chosen
from experiments.images.data import TASKS
from experiments.images.methods import METHODS
from experiments.images.run import RESULTS, run, work


def main() -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m experiments.images", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    features = commands.add_parser("features", help="only take the features of the images, in one process")
    command = commands.add_parser("run", help="train and judge everything that has no result yet")
    report = commands.add_parser("report", help="tables and pictures from the results")
    add_inputs((features, command), "age/, steering/, cells/ and headpose/", "features", "tasks", "age,cells")
    command.add_argument("--seeds", type=int, default=5, help="only the first so many seeds of each task")
    add_run(command, "ours*,mixture")
    add_results((command, report), RESULTS)
    report.add_argument("--pictures", type=Path, default=None, help="folder of the pictures; none without it")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from experiments.images.report import report as write_report

        write_report(arguments.results, arguments.pictures)
        return 0
    tasks = chosen(parser, arguments, "tasks", TASKS)
    if arguments.command == "features":
        for task in tasks:
            task.load(arguments.data, arguments.cache, 0)
        return 0
    pieces = work(tasks, chosen(parser, arguments, "methods", METHODS), arguments.seeds)
    return 0 if run(pieces, arguments.data, arguments.cache, arguments.results, arguments.jobs) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Command line: `python -m experiments.images features`, `... run` and `... report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.images.data import TASKS
from experiments.images.methods import METHODS
from experiments.images.run import RESULTS, run, work
from experiments.uci.run import select


def main() -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m experiments.images", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    features = commands.add_parser("features", help="only take the features of the images, in one process")
    command = commands.add_parser("run", help="train and judge everything that has no result yet")
    for each in (features, command):
        each.add_argument("--data", type=Path, required=True, help="folder with age/, steering/, cells/ and headpose/")
        each.add_argument("--cache", type=Path, required=True, help="folder of features, outside the repository")
        each.add_argument("--tasks", default="*", metavar="PATTERN", help="tasks by name, e.g. 'age,cells'")
    command.add_argument("--methods", default="*", metavar="PATTERN", help="methods by name, e.g. 'ours*,mixture'")
    command.add_argument("--seeds", type=int, default=5, help="only the first so many seeds of each task")
    command.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    report = commands.add_parser("report", help="tables and pictures from the results")
    report.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    report.add_argument("--pictures", type=Path, default=None, help="folder of the pictures; none without it")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from experiments.images.report import report as write_report

        write_report(arguments.results, arguments.pictures)
        return 0
    tasks = select(TASKS, arguments.tasks)
    if not tasks:
        parser.error(f"--tasks {arguments.tasks} matches none of {', '.join(task.name for task in TASKS)}.")
    if arguments.command == "features":
        for task in tasks:
            task.load(arguments.data, arguments.cache, 0)
        return 0
    methods = select(METHODS, arguments.methods)
    if not methods:
        parser.error(f"--methods {arguments.methods} matches none of {', '.join(item.name for item in METHODS)}.")
    pieces = work(tasks, methods, arguments.seeds)
    return 0 if run(pieces, arguments.data, arguments.cache, arguments.results, arguments.jobs) else 1


if __name__ == "__main__":
    raise SystemExit(main())

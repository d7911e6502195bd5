"""Command line: `python -m experiments.detection detectors`, `... run` and `... report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.detection.data import FOLDS, SETS
from experiments.detection.methods import METHODS
from experiments.detection.run import RESULTS, run, train_detectors, work
from experiments.uci.run import select


def main() -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m experiments.detection", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    detectors = commands.add_parser("detectors", help="only train the detectors, in one process")
    command = commands.add_parser("run", help="train and judge everything that has no result yet")
    for each in (detectors, command):
        each.add_argument("--data", type=Path, required=True, help="folder with pennfudan/, bccd/ and coco128/")
        each.add_argument("--cache", type=Path, required=True, help="folder of detectors, outside the repository")
        each.add_argument("--sets", default="*", metavar="PATTERN", help="sets by name, e.g. 'bccd,coco128'")
        each.add_argument("--folds", type=int, default=FOLDS, help="only the first so many folds")
    command.add_argument("--methods", default="*", metavar="PATTERN", help="methods by name, e.g. 'direct*,nce+'")
    command.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    report = commands.add_parser("report", help="tables from the results")
    report.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from experiments.detection.report import report as write_report

        write_report(arguments.results)
        return 0
    sets = select(SETS, arguments.sets)
    if not sets:
        parser.error(f"--sets {arguments.sets} matches none of {', '.join(info.name for info in SETS)}.")
    if arguments.command == "detectors":
        train_detectors(sets, arguments.folds, arguments.data, arguments.cache)
        return 0
    methods = select(METHODS, arguments.methods)
    if not methods:
        parser.error(f"--methods {arguments.methods} matches none of {', '.join(item.name for item in METHODS)}.")
    pieces = work(sets, methods, arguments.folds)
    return 0 if run(pieces, arguments.data, arguments.cache, arguments.results, arguments.jobs) else 1


if __name__ == "__main__":
    raise SystemExit(main())

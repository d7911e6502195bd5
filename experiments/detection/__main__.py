"""Command line: `python -m experiments.detection detectors`, `... run` and `... report`."""

from __future__ import annotations

import argparse

from experiments.command_line import add_inputs, add_results, add_run, chosen
from experiments.detection.data import FOLDS, SETS
from experiments.detection.methods import METHODS
from experiments.detection.run import RESULTS, run, train_detectors, work


def main() -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m experiments.detection", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    detectors = commands.add_parser("detectors", help="only train the detectors, in one process")
    command = commands.add_parser("run", help="train and judge everything that has no result yet")
    report = commands.add_parser("report", help="tables from the results")
    add_inputs((detectors, command), "pennfudan/, bccd/ and coco128/", "detectors", "sets", "bccd,coco128")
    for each in (detectors, command):
        each.add_argument("--folds", type=int, default=FOLDS, help="only the first so many folds")
    add_run(command, "direct*,nce+")
    add_results((command, report), RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "report":
        from experiments.detection.report import report as write_report

        write_report(arguments.results)
        return 0
    sets = chosen(parser, arguments, "sets", SETS)
    if arguments.command == "detectors":
        train_detectors(sets, arguments.folds, arguments.data, arguments.cache)
        return 0
    pieces = work(sets, chosen(parser, arguments, "methods", METHODS), arguments.folds)
    return 0 if run(pieces, arguments.data, arguments.cache, arguments.results, arguments.jobs) else 1


if __name__ == "__main__":
    raise SystemExit(main())

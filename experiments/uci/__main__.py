"""Command line: `python -m experiments.uci run` and `... report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.command_line import add_results, add_run, chosen
from experiments.uci.data import TABLES
from experiments.uci.methods import METHODS
from experiments.uci.run import RESULTS, run, work


def main() -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m experiments.uci", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="train and judge everything that has no result yet")
    command.add_argument("--data", type=Path, default=Path("UCI_Datasets"), help="folder of the tables")
    command.add_argument("--tables", default="*", metavar="PATTERN", help="tables by name, e.g. 'boston,wine*'")
    add_run(command, "energy,mixture")
    command.add_argument("--splits", type=int, default=20, help="only the first so many splits of each table")
    add_results((command, commands.add_parser("report", help="tables from the results")), RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "report":
        from experiments.uci.report import report

        report(arguments.results)
        return 0
    tables = chosen(parser, arguments, "tables", TABLES)
    methods = chosen(parser, arguments, "methods", METHODS)
    pieces = work(tables, methods, arguments.splits)
    return 0 if run(pieces, arguments.data, arguments.results, arguments.jobs) else 1


if __name__ == "__main__":
    raise SystemExit(main())

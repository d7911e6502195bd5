"""Command line: `python -m experiments.uci run` and `... report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.uci.data import TABLES
from experiments.uci.methods import METHODS
from experiments.uci.run import RESULTS, run, select, work


def main() -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m experiments.uci", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="train and judge everything that has no result yet")
    command.add_argument("--data", type=Path, default=Path("UCI_Datasets"), help="folder of the tables")
    command.add_argument("--tables", default="*", metavar="PATTERN", help="tables by name, e.g. 'boston,wine*'")
    command.add_argument("--methods", default="*", metavar="PATTERN", help="methods by name, e.g. 'energy,mixture'")
    command.add_argument("--splits", type=int, default=20, help="only the first so many splits of each table")
    command.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    commands.add_parser("report", help="tables from the results")
    for command in commands.choices.values():
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from experiments.uci.report import report

        report(arguments.results)
        return 0
    tables, methods = select(TABLES, arguments.tables), select(METHODS, arguments.methods)
    for name, chosen, known in (("tables", tables, TABLES), ("methods", methods, METHODS)):
        if not chosen:
            parser.error(
                f"--{name} {getattr(arguments, name)} matches none of {', '.join(item.name for item in known)}."
            )
    pieces = work(tables, methods, arguments.splits)
    return 0 if run(pieces, arguments.data, arguments.results, arguments.jobs) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Command line: `python -m experiments.one_dimensional run` and `... report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.one_dimensional.run import RESULTS, run, select


def main() -> int:
    """Parse the arguments and do what they say."""
    parser = argparse.ArgumentParser(prog="python -m experiments.one_dimensional", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="train and judge everything that has no result yet")
    command.add_argument("--only", default="*", metavar="PATTERN", help="settings by name, e.g. 'toy1-*,toy2-nce'")
    command.add_argument("--seeds", type=int, help="only the first seeds of each setting (whole blocks)")
    command.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    command.add_argument("--list", action="store_true", help="only list the settings")
    commands.add_parser("report", help="tables, in the docs too, and pictures from the results")
    for command in commands.choices.values():
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from experiments.one_dimensional.report import DOCS, fill, report

        report(arguments.results)
        if arguments.results == RESULTS:
            fill(DOCS, arguments.results)
        return 0
    from experiments.one_dimensional.settings import SETTINGS

    settings = select(SETTINGS, arguments.only)
    if not settings:
        parser.error(f"--only {arguments.only} matches no setting; --list shows their names.")
    if arguments.list:
        for setting in settings:
            print(
                f"{setting.name:24} {setting.seeds:3} seeds, blocks of {setting.block:2}, ~{setting.seconds:.0f} s each"
            )
        return 0
    return 0 if run(settings, arguments.results, arguments.seeds, arguments.jobs) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""What the command lines of the experiments share: choosing by patterns, and the options of every run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = ["add_inputs", "add_results", "add_run", "chosen", "select"]


def select(items: Sequence[Any], pattern: str) -> list[Any]:
    """What has a name that matches one of some shell patterns, parted by commas."""
    return [item for item in items if any(fnmatch(item.name, part) for part in pattern.split(","))]


def chosen(parser: ArgumentParser, arguments: Namespace, option: str, items: Sequence[Any]) -> list[Any]:
    """What an option chooses by its patterns; the command ends with an error where that is nothing."""
    found = select(items, getattr(arguments, option))
    if not found:
        known = ", ".join(item.name for item in items)
        parser.error(f"--{option} {getattr(arguments, option)} matches none of {known}.")
    return found


def add_inputs(parsers: Sequence[ArgumentParser], data: str, cache: str, option: str, example: str) -> None:
    """Add the folders of the data and of what is made of them, and the option that chooses among the data."""
    for parser in parsers:
        parser.add_argument("--data", type=Path, required=True, help=f"folder with {data}")
        parser.add_argument("--cache", type=Path, required=True, help=f"folder of {cache}, outside the repository")
        parser.add_argument(f"--{option}", default="*", metavar="PATTERN", help=f"{option} by name, e.g. '{example}'")


def add_run(parser: ArgumentParser, example: str) -> None:
    """Add the options of a run: which methods, in how many processes."""
    parser.add_argument("--methods", default="*", metavar="PATTERN", help=f"methods by name, e.g. '{example}'")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")


def add_results(parsers: Sequence[ArgumentParser], default: Path) -> None:
    """Add the folder of results."""
    for parser in parsers:
        parser.add_argument("--results", type=Path, default=default, help="folder of results")

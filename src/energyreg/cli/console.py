"""What all commands share: exit statuses, errors of the user's input, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

__all__ = ["FAILED", "INTERRUPTED", "WRONG_INPUT", "InputError", "check_writable", "print_json", "print_table", "stop"]

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130


class InputError(ValueError):
    """The user's input cannot be used; the message is all that is shown."""


def stop(message: str, status: int) -> NoReturn:
    """End the command with one line on stderr."""
    typer.echo(f"energyreg: {message}", err=True)
    raise typer.Exit(status)


def print_json(value: Mapping[str, Any]) -> None:
    """Print JSON on stdout; what is not finite is null."""

    def plain(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, Mapping):
            return {key: plain(entry) for key, entry in item.items()}
        return [plain(entry) for entry in item] if isinstance(item, (list, tuple)) else item

    typer.echo(json.dumps(plain(value), ensure_ascii=False, indent=2))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], width: int = 100) -> None:
    """Print a table on stdout: in colour on a terminal, in plain characters of this width elsewhere."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=width, no_color=True, highlight=False)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2)
    table.add_column(headings[0], no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


ROOM = 2**26
"""Bytes that the disk must have free for a file whose size is not known before the work."""


def check_writable(path: Path) -> None:
    """Find a folder that cannot be written to, or a full disk, before the work, not after it.

    Raises:
        OSError: If the file cannot be written, with the reason.
    """
    from energyreg.files import check_room

    check_room(path, ROOM)

"""What all commands share: exit statuses, errors of the user's input, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer

__all__ = ["FAILED", "INTERRUPTED", "WRONG_INPUT", "InputError", "check_writable", "print_json", "stop"]

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


ROOM = 2**26
"""Bytes that the disk must have free for a file whose size is not known before the work."""


def check_writable(path: Path) -> None:
    """Find a folder that cannot be written to, or a full disk, before the work, not after it.

    Raises:
        OSError: If the file cannot be written, with the reason.
    """
    from energyreg.files import check_room

    check_room(path, ROOM)

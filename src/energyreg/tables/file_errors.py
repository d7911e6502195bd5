"""What is wrong with a table in a file, said of the file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["TableFileError", "check_names", "describe_value", "first_line"]


class TableFileError(ValueError):
    """A file that is no table, or none that fits.

    Args:
        path: The file, with which the message begins.
        reason: What is wrong, and what to do.
        row: The row that it is about, counted from 1.
        column: The column that it is about.
    """

    def __init__(
        self, path: str | os.PathLike[str], reason: str, *, row: int | None = None, column: str | None = None
    ) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.row, self.column = Path(path), reason, row, column

    def __reduce__(self) -> Any:
        return partial(TableFileError, self.path, self.reason, row=self.row, column=self.column), ()


def describe_value(value: Any) -> str:
    """What an error calls a value of a table."""
    import pandas

    return "no value" if pandas.isna(value) else repr(value if isinstance(value, str) else str(value))


def check_names(path: Path, names: Sequence[str]) -> None:
    """Refuse a table without columns, or with a name twice."""
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if not names:
        raise TableFileError(path, "the table has no columns.")
    if count > 1:
        where = " and ".join(str(i + 1) for i, other in enumerate(names) if other == name)
        raise TableFileError(path, f"the column name {name!r} stands {count} times (columns {where}); rename them.")


def first_line(error: Exception) -> str:
    """The first line of an error of a library, and what to do."""
    text = (str(error).splitlines() or ["unreadable"])[0].rstrip(".")
    return f"{text}. Copy it again, or save it again."

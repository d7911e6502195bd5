"""Errors about data that say where the fault is, so that who knows the file can say it in the file's own words."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

__all__ = ["DataError", "DataTypeError", "Located", "MissingFileError"]


class Located(Exception):
    """An error about data, by argument, row and column.

    Args:
        text: The message, with fields in braces: `{name}`, `{row}` (the first of the rows), `{rows[1]}`,
            `{column!r}`, `{path}`, and those of `more`.
        name: What the message calls the data: the argument that holds them.
        rows: Numbers of the rows that it names, from 0.
        column: The column: its name, or its number from 0.
        path: The file.
        more: Other fields.

    Attributes:
        row: The first of the rows, or None.

    >>> error = DataError("{name} has {value} in row {row}, column {column!r}", name="y", rows=[3], column=0, value=-1)
    >>> str(error)
    'y has -1 in row 3, column 0'
    >>> error.reworded(name="the target", rows=[104], column="price")
    "the target has -1 in row 104, column 'price'"
    """

    def __init__(
        self,
        text: str,
        *,
        name: str = "",
        rows: Sequence[int] = (),
        column: int | str | None = None,
        path: Any = None,
        **more: Any,
    ) -> None:
        self.text, self.name, self.path, self.more = text, name, path, more
        self.rows = [int(row) for row in rows]
        self.column = column if column is None or isinstance(column, str) else int(column)
        super().__init__(self.reworded())

    @property
    def row(self) -> int | None:
        """The first of the rows that the message names."""
        return self.rows[0] if self.rows else None

    def reworded(self, **fields: Any) -> str:
        """The message with other fields, such as `rows` that count otherwise."""
        known = {"name": self.name, "rows": self.rows, "column": self.column, "path": self.path, **self.more, **fields}
        return self.text.format(row=next(iter(known["rows"]), None), **known)

    def __reduce__(self) -> Any:
        fields = {"name": self.name, "rows": self.rows, "column": self.column, "path": self.path, **self.more}
        return functools.partial(type(self), self.text, **fields), ()


class DataError(Located, ValueError):
    """Values that cannot be used."""


class DataTypeError(Located, TypeError):
    """Values of a type that cannot be used."""


class MissingFileError(Located, FileNotFoundError):
    """A file that the data name, and that does not exist."""

"""Tables block by block: how a table of any size becomes the matrix of numbers that a model is trained on.

A source (a table in memory, or a file) is read in blocks of rows, each of which is encoded and forgotten; what stays is
one float32 matrix, in memory or in a temporary file that is mapped into it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from energyreg.files import reserve, writing_error
from energyreg.tables import files as tablefiles
from energyreg.tables.cells import CellWarning, Reading, Tally
from energyreg.tables.columns import Column, column_names, read_columns
from energyreg.tables.file_errors import TableFileError, describe_value
from energyreg.tables.preprocessing import TablePreprocessor

if TYPE_CHECKING:
    from pandas import Series

__all__ = ["FileTable", "MemoryTable", "Scratch", "Source", "encode", "rows_to_learn_from"]

BLOCK_ROWS = 65_536
"""Rows of a block, at most; a table of as many is read whole."""
BLOCK_BYTES = 2**23
"""Size of a block of float64, at most."""
LEARNING_ROWS = 200_000
"""Rows that a preprocessor is learned on, at most."""
LEARNING_BYTES = 2**25
"""Their size in float64, at most; but 10,000 rows in any case."""


def block_rows(width: int) -> int:
    """Rows of a block of a table of so many columns."""
    return max(min(BLOCK_ROWS, BLOCK_BYTES // (8 * max(width, 1))), 256)


def rows_to_learn_from(rows: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Those of the training rows that the preprocessor is learned on: all, or a random subset in ascending order.

    Args:
        rows: Ascending row numbers.
        width: Columns of the table.
        seed: Of the choice.
    """
    most = min(LEARNING_ROWS, max(LEARNING_BYTES // (8 * max(width, 1)), 10_000))
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng([seed, 1]).choice(len(rows), most, replace=False, shuffle=False))]


# ---------------------------------------------------------------------------------------------- sources


class Source(Protocol):
    """A table that is read in blocks.

    Attributes:
        names: Names of the columns as text, or None.
        given: The names as the table has them, or None.
        rows: Rows.
        width: Columns.
        on_disk: Whether the table is not in memory, so that its encoded rows may be too many for that, too.
        readings: Number of a column of text → how its cells are read; `blocks` and `take` have read them so.
        warnings: What is to be said of odd cells.
        times: Dates of the rows, in microseconds: columns without text, and a dated index as "the index".
    """

    names: list[str] | None
    given: list[Any] | None
    rows: int
    width: int
    on_disk: bool
    readings: dict[int, Reading]
    warnings: list[CellWarning]
    times: dict[int | str, np.ndarray]

    def blocks(self) -> Iterator[tuple[int, list[Column]]]:
        """First row and columns of each block, in order."""
        ...

    def take(self, rows: np.ndarray) -> list[Column]:
        """The columns of some rows, given by ascending numbers."""
        ...


def as_read(readings: Mapping[int, Reading], columns: Sequence[Column]) -> list[Column]:
    """Columns whose cells of text are read."""
    return [readings[i].column(column) if i in readings else column for i, column in enumerate(columns)]


class MemoryTable:
    """A table in memory, or mapped into it from a file: an array, a frame or an Arrow table.

    Args:
        table: The table.
        name: What an error calls it.

    Raises:
        ValueError: As :func:`~energyreg.tables.read_columns`.
        TypeError: As `read_columns`.
    """

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table, name
        self.given = column_names(table)
        shape: tuple[Any, ...] = tuple(getattr(table, "shape", ()))
        sparse = hasattr(table, "toarray")
        self.on_disk = isinstance(table, np.memmap)
        self._whole: list[Column] | None = None
        if not sparse and len(shape) == 2 and shape[1] and shape[0] > block_rows(int(shape[1])):
            self.rows, self.width = int(shape[0]), int(shape[1])
            self.names, _ = self._read(0, 1)
        else:
            self.names, self._whole, self.rows = read_columns(table, name)
            self.width = len(self._whole)
        self.readings: dict[int, Reading] = {}
        self.warnings: list[CellWarning] = []
        self.times: dict[int | str, np.ndarray] = _dates_of(getattr(table, "index", None))
        self._judge_text()

    def _judge_text(self) -> None:
        """Find out which columns of text hold numbers or dates, from all of their cells."""
        if isinstance(self.table, np.ndarray) and self.table.dtype.kind in "iufbcm":
            return
        tallies: dict[int, Tally] = {}
        dates: dict[int, list[np.ndarray]] = {}
        for start, columns in self._raw_blocks():
            for index, column in enumerate(columns):
                if column.kind == "time" and not column.categorical:
                    dates.setdefault(index, []).append(column.values)
                if column.kind == "text":
                    tallies.setdefault(index, Tally()).add(column.values, start)
                elif index in tallies and column.kind in ("number", "time"):
                    known = column.values[~column.missing()]
                    whole = column.kind == "number" and bool((known == np.round(known)).all())
                    tallies[index].add_values(column.kind, len(known), whole=whole)
        for index, tally in tallies.items():
            self.readings[index] = tally.reading()
            label = index if self.names is None else self.names[index]
            warning = tally.warning(self.readings[index], self.name, label)
            if warning is not None:
                self.warnings.append(warning)
        if self._whole is not None:
            self._whole = as_read(self.readings, self._whole)
            dates |= {i: [self._whole[i].values] for i in self.readings if self._whole[i].kind == "time"}
        for index, parts in sorted(dates.items()):
            if sum(map(len, parts)) == self.rows:
                self.times[index if self.names is None else self.names[index]] = np.concatenate(parts)

    def _slice(self, start: int, stop: int) -> Any:
        if hasattr(self.table, "iloc"):
            return self.table.iloc[start:stop]
        if self.given is not None and hasattr(self.table, "slice"):  # polars and Arrow
            return self.table.slice(start, stop - start)
        return self.table[start:stop]

    def _read(self, start: int, stop: int) -> tuple[list[str] | None, list[Column]]:
        try:
            names, columns, _ = read_columns(self._slice(start, stop), self.name)
        except (ValueError, TypeError):
            read_columns(self.table, self.name)  # says the same with the rows of the whole table
            raise
        return names, columns

    def _raw_blocks(self) -> Iterator[tuple[int, list[Column]]]:
        if self._whole is not None:
            yield 0, self._whole
            return
        step = block_rows(self.width)
        for start in range(0, self.rows, step):
            yield start, self._read(start, min(start + step, self.rows))[1]

    def blocks(self) -> Iterator[tuple[int, list[Column]]]:
        for start, columns in self._raw_blocks():
            yield start, as_read(self.readings, columns)

    def take(self, rows: np.ndarray) -> list[Column]:
        return _take(self, rows)


def _dates_of(index: Any) -> dict[int | str, np.ndarray]:
    """The dates of a pandas index, where it has some."""
    if type(index).__name__ not in ("DatetimeIndex", "PeriodIndex"):
        return {}
    _, (column,), _ = read_columns(index.to_frame(name="index"), "X")
    return {"the index": column.values}


class FileTable:
    """A table in a file: CSV, Parquet or Feather, by its suffix.

    It is read once for the targets (of a Parquet file only their columns), and once for each call of `blocks`.

    Args:
        path: The file.
        targets: Target columns.
        drop: Columns that are not used.
        weight: Column of the rows' weights, or None.
        missing: Cells that stand for a missing value, besides the usual ones.
        group: Column of the rows' groups, or None; it is no input.
        time: Column of the rows' time, or None.

    Attributes:
        targets: Targets, shape (N, D), float64.
        weights: Weights, shape (N,), or None.
        groups: Groups, shape (N,), or None.
        time: Times, shape (N,), or None.

    Raises:
        FileNotFoundError: There is no such file.
        TableFileError: The file is damaged, empty or of another kind, lacks a column, or a target or weight is missing
            or no number.
    """

    on_disk = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        targets: Sequence[str],
        drop: Sequence[str] = (),
        weight: str | None = None,
        missing: Sequence[str] = (),
        group: str | None = None,
        time: str | None = None,
    ) -> None:
        self.path = Path(path)
        there = tablefiles.columns_of(path)
        wanted = [*targets, *([] if weight is None else [weight])]
        beside = {name for name in (group, time) if name is not None}
        for name in [*wanted, *drop, *sorted(beside)]:
            if name not in there:
                shown = ", ".join(map(repr, there[:8])) + (", ..." if len(there) > 8 else "")
                raise TableFileError(self.path, f"there is no column {name!r}; the columns are {shown}.")
        if len(set(wanted)) < len(wanted):
            raise TableFileError(self.path, f"target and sample_weight name a column twice: {', '.join(wanted)}.")
        if set(wanted) & set(drop):
            name = min(set(wanted) & set(drop))
            raise TableFileError(self.path, f"the column {name!r} is a target or the weights; do not drop it.")
        self.features = [name for name in there if name not in {*wanted, *drop, group}]
        self.names: list[str] | None = self.features
        self.given: list[Any] | None = list(self.features)
        self.width = len(self.features)
        self.missing = list(missing)
        if not self.features:
            raise TableFileError(self.path, "no column is left to predict from; pass a table with more columns.")
        typed = tablefiles.is_typed(path)
        texts, dated = (tablefiles.typed_columns(path, kind) for kind in ("text", "time"))
        judged = [name for name in self.features if texts is None or name in texts]
        tallies = {name: Tally() for name in judged}
        kinds: dict[str, set[str]] = {name: set() for name in judged}
        numbers: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        dates: dict[str, list[np.ndarray]] = {name: [] for name in self.features if dated is None or name in dated}
        others: dict[str, list[np.ndarray]] = {name: [] for name in beside}
        self.rows = 0
        some = sorted({*wanted, *judged, *dates, *beside}) if typed else None
        for frame in tablefiles.read_chunks(path, rows=block_rows(self.width), columns=some, missing=missing):
            for name in wanted:
                what = "weight" if name == weight else "target"
                numbers[name].append(_numbers(frame[name], self.path, what, self.rows))
            for name in judged:
                kinds[name] |= _count_cells(frame[name], tallies[name], self.rows)
            for name, parts in dates.items():
                if frame[name].dtype.kind == "M":
                    parts.append(read_columns(frame[[name]], "X")[1][0].values)
            for name, parts in others.items():
                parts.append(frame[name].to_numpy(object))
            self.rows += len(frame)
        self.times: dict[int | str, np.ndarray] = {
            name: np.concatenate(parts) for name, parts in dates.items() if sum(map(len, parts)) == self.rows
        }
        self.groups = None if group is None else np.concatenate(others[group])
        self.time = None if time is None else np.concatenate(others[time])
        # What one block holds may look like numbers, and the next may not.
        self.kinds: dict[str, str] = {}
        self.readings: dict[int, Reading] = {}
        self.warnings: list[CellWarning] = []
        for name, found in kinds.items():
            if found in ({"number"}, {"time"}, {"boolean"}):
                self.kinds[name] = min(found)
            elif found:
                index = self.features.index(name)
                reading = self.readings[index] = tallies[name].reading()
                self.kinds[name] = reading.kind
                warning = tallies[name].warning(reading, "X", name)
                if warning is not None:
                    text = tablefiles.error_about(warning.error, self.path, targets)
                    self.warnings.append(CellWarning(warning.error, text))
        joined = {name: np.concatenate(parts) for name, parts in numbers.items()}
        self.targets = np.stack([joined[name] for name in targets], 1)
        self.weights = None if weight is None else joined[weight]

    def blocks(self) -> Iterator[tuple[int, list[Column]]]:
        start = 0
        step = block_rows(self.width)
        options: dict[str, Any] = {"kinds": self.kinds, "columns": self.features, "missing": self.missing}
        for frame in tablefiles.read_chunks(self.path, rows=step, **options):
            if start + len(frame) > self.rows:
                break
            try:
                yield start, as_read(self.readings, read_columns(frame[self.features], "X")[1])
            except (ValueError, TypeError) as error:
                raise tablefiles.error_about(error, self.path, (), start) from error
            start += len(frame)
        if start != self.rows:
            raise TableFileError(self.path, "the file has changed while it was read; leave it as it is during fit.")

    def take(self, rows: np.ndarray) -> list[Column]:
        return _take(self, rows)


def _count_cells(series: Series, tally: Tally, start: int) -> set[str]:
    """Count the cells of a block of a column; returns what they seem to hold, as :func:`~files.kind_of`."""
    kinds = tablefiles.kind_of(series)
    if kinds == {"text"}:
        tally.add(
            (None if missing else str(value) for value, missing in zip(series, series.isna(), strict=True)), start
        )
    elif kinds & {"number", "time"}:
        known = series.dropna()
        whole = kinds == {"number"} and bool((known == known.round()).all())
        tally.add_values(min(kinds), len(known), whole=whole)
    return kinds


def _numbers(series: Series, path: Path, what: str, offset: int) -> np.ndarray:
    """Targets or weights, all of them finite; rows count from 1."""
    import pandas

    dates = pandas.api.types.is_datetime64_any_dtype(series.dtype)
    values = tablefiles.to_numbers(series)
    bad = np.ones(len(values), bool) if dates else ~np.isfinite(values)
    if what == "weight":
        bad |= values < 0
    if bad.any():
        row = int(bad.argmax())
        found = describe_value(series.iloc[row])
        raise TableFileError(
            path,
            f"the {what} column {str(series.name)!r} has {found} in row {offset + row + 1}; expected finite "
            f"numbers{' ≥ 0' if what == 'weight' else ''}. Fill in or drop such rows.",
            row=offset + row + 1,
            column=str(series.name),
        )
    return values


def _take(source: Source, rows: np.ndarray) -> list[Column]:
    collected = [_Collected(len(rows)) for _ in range(source.width)]
    for start, columns in source.blocks():
        low, high = np.searchsorted(rows, [start, start + len(columns[0].values)])
        if low < high:
            chosen = rows[low:high] - start
            for whole, column in zip(collected, columns, strict=True):
                whole.add(int(low), int(high), Column(column.kind, column.values[chosen], column.categorical))
    return [whole.column() for whole in collected]


class _Collected:
    """A column that is put together from those of several blocks; a block without a value fits to any.

    Its place is taken at once, as thousands of small pieces that are kept would leave holes between them.
    """

    def __init__(self, count: int) -> None:
        self.values = np.full(count, np.nan)
        self.first: Column | None = None
        self.known: Column | None = None

    def add(self, low: int, high: int, piece: Column) -> None:
        """Set the values of some rows."""
        self.first = piece if self.first is None else self.first
        if piece.kind == "missing" or bool(piece.missing().all()):
            return
        if self.known is None:
            self.known = piece
            if piece.values.dtype == object:
                self.values = np.full(len(self.values), None, object)
        kinds = {self.known.kind, piece.kind}
        if kinds == {"number", "boolean"}:  # as in a column that mixes both
            if piece.kind == "number" and self.values.dtype == object:
                self.values, self.known = _booleans_as_numbers(self.values), piece
        elif len(kinds) > 1:
            raise ValueError(f"a column mixes {' with '.join(sorted(kinds))}; expected one kind. Convert it.")
        values, objects = piece.values, self.values.dtype == object
        self.values[low:high] = values if objects or values.dtype != object else _booleans_as_numbers(values)

    def column(self) -> Column:
        """The whole column."""
        like = self.known or self.first
        assert like is not None
        objects = like.values.dtype == object and self.values.dtype != object
        return Column(like.kind, np.full(len(self.values), None, object) if objects else self.values, like.categorical)


def _booleans_as_numbers(values: np.ndarray) -> np.ndarray:
    return np.array([np.nan if value is None else float(value == "True") for value in values])


# ---------------------------------------------------------------------------------------------- encoded matrices


class Scratch:
    """Room for matrices: in memory, or in a temporary file that is mapped into it.

    The file goes when it is closed: at once from its folder, where the system allows that, and from the disk with the
    last use of the matrix or the end of the process, whatever ends it.

    Args:
        in_memory: Bytes from which on a matrix is in a file; None for never.

    Raises:
        OSError: If there is no room for the file; the variable TMPDIR names another folder.
    """

    def __init__(self, in_memory: int | None) -> None:
        self.in_memory = in_memory
        self._folders: list[tempfile.TemporaryDirectory[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for folder in self._folders:
            folder.cleanup()

    def empty(self, rows: int, columns: int) -> np.ndarray:
        """A float32 matrix of this shape to be filled."""
        size = 4 * rows * columns
        if self.in_memory is None or size < max(self.in_memory, 1):
            return np.empty((rows, columns), np.float32)
        # Where a file that is mapped cannot be removed, the folder is left to the system's own cleaning.
        folder = tempfile.TemporaryDirectory(prefix="energyreg-", ignore_cleanup_errors=True)
        self._folders.append(folder)
        path = Path(folder.name) / f"{secrets.token_hex(4)}.float32"
        try:
            with open(path, "xb") as file:
                # A file with holes would end the process, instead of an error, when the disk is full.
                reserve(file, size)
        except OSError as error:
            raise writing_error(path.parent, error, size) from error
        matrix = np.memmap(path, np.float32, "r+", shape=(rows, columns))
        with contextlib.suppress(OSError):
            path.unlink()
        return np.asarray(matrix)


def encode(
    source: Source, preprocessor: TablePreprocessor, parts: Sequence[np.ndarray], scratch: Scratch
) -> list[np.ndarray]:
    """The matrix of each part of a table's rows, float32, read and encoded block by block.

    Args:
        source: The table.
        preprocessor: What was learned on its training rows.
        parts: Ascending row numbers.
        scratch: Where the matrices go.

    Returns:
        One a part, shape (rows of the part, F).

    Raises:
        ValueError: If a block has values of another kind than the rows that were learned on.
    """
    width = len(preprocessor.features_)
    matrices = [scratch.empty(len(part), width) for part in parts]
    for start, columns in source.blocks():
        count = len(columns[0].values)
        x = preprocessor.transform_columns(source.names, columns, count)
        for part, matrix in zip(parts, matrices, strict=True):
            low, high = np.searchsorted(part, [start, start + count])
            if low < high:
                matrix[low:high] = x[part[low:high] - start]
    return matrices

"""Tables on disk: CSV, Parquet and Feather, read and written in chunks of rows, so that memory is bounded.

Everything that can be wrong with such a file is said in one line that names the file, the column and the row. Rows
count from 1, the header of a CSV is none.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import os
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from energyreg.errors import Located
from energyreg.files import writing_error

if TYPE_CHECKING:
    from pandas import DataFrame, Series

__all__ = [
    "TableFileError",
    "TableWriter",
    "check_readable",
    "columns_of",
    "count_rows",
    "error_about",
    "is_typed",
    "kind_of",
    "read",
    "read_chunks",
]

CHUNK_ROWS = 4_096
"""Rows that are in memory at once."""
FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".parquet": "parquet", ".pq": "parquet", ".feather": "feather",
    ".arrow": "feather",
}  # fmt: skip
"""Suffixes of files, and what they hold."""
SEPARATORS = ",;\t|"
SAMPLE_BYTES = 65_536
"""How much of a CSV its separator and decimal mark are found by."""
SAMPLE_LINES = 50
BUFFER_BYTES = 2**16
"""What is read of a column of a Parquet file at once, instead of the whole of its row group."""


class TableFileError(ValueError):
    """A file that is no table, or none that fits.

    Args:
        path: The file, with which the message begins.
        reason: What is wrong, and what to do.
        row: The row that it is about, counted from 1.
        column: The column that it is about.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        reason: str,
        *,
        row: int | None = None,
        column: str | None = None,
    ) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.row, self.column = Path(path), reason, row, column

    def __reduce__(self) -> Any:
        return partial(TableFileError, self.path, self.reason, row=self.row, column=self.column), ()


# ---------------------------------------------------------------------------------------------- reading


def read(path: str | os.PathLike[str], *, kinds: Mapping[str, str] | None = None) -> DataFrame:
    """Read a table whole; see :func:`read_chunks`."""
    frames = list(read_chunks(path, rows=None, kinds=kinds))
    import pandas  # afterwards: a missing file is said at once

    return frames[0] if len(frames) == 1 else pandas.concat(frames, ignore_index=True)


def read_chunks(
    path: str | os.PathLike[str],
    *,
    rows: int | None = CHUNK_ROWS,
    kinds: Mapping[str, str] | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[DataFrame]:
    """Read a table in chunks of rows.

    Args:
        path: CSV (.csv, .tsv, .txt; UTF-8, any of the usual separators), Parquet (.parquet, .pq) or Feather (.feather,
            .arrow).
        rows: Rows of a chunk, at most; None for all at once.
        kinds: Column → what it holds: "number", "text", "boolean" or "time". A CSV does not say it, and a chunk of it
            may look otherwise than the whole; columns that are not named are judged by their values.
        columns: Columns to read, which the file must have; by default all.

    Yields:
        Frames with these columns, in the order of the file, at least one row each.

    Raises:
        FileNotFoundError: There is no such file.
        TableFileError: The file is empty, damaged or of another kind, has a column name twice, or a value of another
            kind than its column.
    """
    path, kind = Path(path), check_readable(path)
    reader = {"csv": _csv, "parquet": _parquet, "feather": _feather}[kind]
    some = False
    for frame in reader(path, rows, kinds or {}, columns):
        if len(frame) == 0:
            continue
        some = True
        yield frame
    if not some:
        raise TableFileError(path, "the table has a header, but no rows.")


def check_readable(path: str | os.PathLike[str]) -> str:
    """The format of a file that may hold a table: "csv", "parquet" or "feather". Its content is not looked at.

    Raises:
        FileNotFoundError: There is no such file.
        TableFileError: It is empty, a folder, or has the suffix of something else.
    """
    path = Path(path)
    kind = _format(path, "read")
    if path.is_dir():
        raise TableFileError(path, "is a folder; expected a file.")
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file", str(path))
    if path.stat().st_size == 0:
        raise TableFileError(path, "the file is empty; expected a table with a header and rows.")
    return kind


def columns_of(path: str | os.PathLike[str]) -> list[str]:
    """Names of a table's columns, without reading its values.

    Raises:
        FileNotFoundError: There is no such file.
        TableFileError: As :func:`read_chunks`.
    """
    path, kind = Path(path), check_readable(path)
    if kind == "csv":
        return _dialect(path).names
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if kind == "parquet":
            with parquet.ParquetFile(path) as file:
                names = [str(name) for name in file.schema_arrow.names]
        else:
            with pyarrow.memory_map(str(path)) as source, ipc.open_file(source) as file:
                names = [str(name) for name in file.schema.names]
    except (pyarrow.ArrowException, OSError) as error:
        raise _incomplete(path, kind, error) from None
    _check_names(path, names)
    return names


def is_typed(path: str | os.PathLike[str]) -> bool:
    """Whether the file itself says what its columns hold, as a CSV does not."""
    return _format(Path(path), "read") != "csv"


def kind_of(series: Series) -> set[str]:
    """What a column seems to hold, as `kinds` of :func:`read_chunks` takes it; nothing where all values are missing."""
    from pandas.api import types

    if not bool(series.notna().any()):
        return set()
    if types.is_datetime64_any_dtype(series.dtype):
        return {"time"}
    if types.infer_dtype(series, skipna=True) == "boolean":
        return {"boolean"}
    return {"number"} if types.is_numeric_dtype(series.dtype) else {"text"}


def describe_value(value: Any) -> str:
    """What an error calls a value of a table."""
    import pandas

    return "no value" if pandas.isna(value) else repr(value if isinstance(value, str) else str(value))


def error_about(error: Exception, path: Path, targets: Sequence[str], offset: int = 0) -> TableFileError:
    """An error of the estimator in the words of the file: column names and rows from 1 instead of X, y and positions.

    Args:
        error: The error; one that does not say where it is keeps its words.
        path: The file.
        targets: Names of the target columns.
        offset: Rows of the file before X.
    """
    if not isinstance(error, Located):
        return TableFileError(path, str(error))
    column = error.column
    if isinstance(column, int) and error.name.startswith("y") and column < len(targets):
        column = targets[column]
    name = {"X": "the table", "y": "the target"}.get(error.name, error.name)
    rows = [row + 1 + offset for row in error.rows]
    text = error.reworded(name=name, rows=rows, column=column)
    return TableFileError(path, text, row=rows[0] if rows else None, column=None if column is None else str(column))


def count_rows(path: str | os.PathLike[str]) -> int:
    """About how many rows a table has, without reading its values: for a CSV its lines; 0 where nobody knows."""
    path = Path(path)
    with contextlib.suppress(Exception):
        kind = FORMATS[path.suffix.lower()]
        if kind == "parquet":
            from pyarrow import parquet

            return int(parquet.ParquetFile(path).metadata.num_rows)
        if kind == "feather":
            import pyarrow
            from pyarrow import ipc

            with pyarrow.memory_map(str(path)) as source, ipc.open_file(source) as file:
                return sum(file.get_batch(i).num_rows for i in range(file.num_record_batches))
        with open(path, "rb") as lines:
            return max(sum(block.count(b"\n") for block in iter(lambda: lines.read(2**20), b"")) - 1, 0)
    return 0


def _format(path: Path, verb: str) -> str:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(FORMATS)
        what = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise TableFileError(path, f"cannot {verb} a file with {what}; expected one of {known}.")
    return kind


def _check_names(path: Path, names: Sequence[str]) -> None:
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if not names:
        raise TableFileError(path, "the table has no columns.")
    if count > 1:
        where = " and ".join(str(i + 1) for i, other in enumerate(names) if other == name)
        raise TableFileError(path, f"the column name {name!r} stands {count} times (columns {where}); rename them.")


@dataclass(frozen=True)
class _Dialect:
    """How a CSV is written: separator, decimal mark and column names."""

    separator: str
    decimal: str
    names: list[str]


def _csv(path: Path, rows: int | None, kinds: Mapping[str, str], columns: Sequence[str] | None) -> Iterator[DataFrame]:
    import pandas

    dialect = _dialect(path)
    text = {name: str for name in dialect.names if kinds.get(name) in ("text", "time")}
    done = 0
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            reader = pandas.read_csv(
                file, sep=dialect.separator, decimal=dialect.decimal, encoding="utf-8-sig", dtype=text, index_col=False,
                usecols=None if columns is None else [dialect.names.index(name) for name in columns],
                chunksize=rows or 2**62, low_memory=False, skipinitialspace=True,
            )  # fmt: skip
            for frame in reader:
                frame.index = pandas.RangeIndex(len(frame))
                yield _typed(path, frame, kinds, done)
                done += len(frame)
    except UnicodeDecodeError:
        raise _bad_encoding(path) from None
    except pandas.errors.EmptyDataError:
        raise TableFileError(path, "the file holds no table.") from None
    except (pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
        found = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if found:
            what = f"line {found[2]} has {found[3]} values, but the header has {found[1]}"
            raise TableFileError(path, f"{what}; quote values that hold {dialect.separator!r}.") from None
        raise TableFileError(path, f"the file is no complete CSV: {str(error).strip()}.") from None


def _typed(path: Path, frame: DataFrame, kinds: Mapping[str, str], done: int) -> DataFrame:
    """The columns as what they are to be; dates in text become dates."""
    import pandas

    for name in frame.columns:
        kind, series = kinds.get(str(name)), frame[name]
        texts = series.dtype == object or isinstance(series.dtype, pandas.StringDtype)
        if kind in ("number", "duration") and texts:
            numbers = pandas.to_numeric(series, errors="coerce")
            bad = numbers.isna() & series.notna()
            if bad.any():
                row = int(bad.to_numpy().argmax())
                raise TableFileError(
                    path,
                    f"column {name!r} has {str(series.iloc[row])!r} in row {done + row + 1}; expected a number.",
                    row=done + row + 1,
                    column=str(name),
                )
            frame[name] = numbers
        elif kind == "time" or (kind is None and texts and _looks_like_dates(series)):
            times = pandas.to_datetime(series, errors="coerce", format="ISO8601")
            bad = times.isna() & series.notna()
            if kind == "time" and bad.any():
                row = int(bad.to_numpy().argmax())
                raise TableFileError(
                    path,
                    f"column {name!r} has {str(series.iloc[row])!r} in row {done + row + 1}; expected a date, "
                    "as 2024-05-31 or 2024-05-31 14:00.",
                    row=done + row + 1,
                    column=str(name),
                )
            if not bad.any():
                frame[name] = times
    return frame


def _looks_like_dates(series: Any) -> bool:
    known = series.dropna()
    return len(known) > 0 and all(re.match(r"\d{4}-\d\d-\d\d", str(value)) for value in known.iloc[:20])


def _dialect(path: Path) -> _Dialect:
    with open(path, "rb") as file:
        content = file.read(SAMPLE_BYTES)
        complete = len(content) < SAMPLE_BYTES
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise TableFileError(path, "the file is in UTF-16; expected UTF-8. Save it as UTF-8.")
    if b"\0" in content:
        kind = "a Parquet file" if content.startswith(b"PAR1") else "binary"
        raise TableFileError(path, f"the file is {kind}, no text; rename it, or save the table as CSV.")
    if not complete:  # the last line may be cut, even within a letter
        content = content[: content.rfind(b"\n") + 1] or content
    try:
        sample = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if complete or error.end < len(content):
            raise _bad_encoding(path) from None
        sample = content.decode("utf-8-sig", "ignore")
    if not sample.strip():
        raise TableFileError(path, "the file is empty; expected a table with a header and rows.")
    best: tuple[int, str, list[list[str]]] | None = None
    for separator in SEPARATORS:
        lines = _split(sample, separator)
        # The separator that cuts all lines into as many values as the header, and the more the better.
        width = len(lines[0])
        if width > 1:
            alike = sum(len(line) == width for line in lines) / len(lines)
            score = round(1000 * alike) * 1000 + min(width, 999)
            if best is None or score > best[0]:
                best = score, separator, lines
    if best is None and _cut_by_blanks(sample):
        return _Dialect(r"\s+", ".", sample.splitlines()[0].split())
    _, separator, lines = best or (0, ",", _split(sample, ","))
    names, body = [name.strip() for name in lines[0]], lines[1:]
    _check_names(path, names)
    for number, line in enumerate(body, 2):
        if len(line) > len(names):
            raise TableFileError(
                path,
                f"line {number} has {len(line)} values, but the header has {len(names)}; quote values that "
                f"hold {separator!r}, or check the header.",
            )
    cells = [cell for line in body for cell in line]
    comma = separator != "," and any(re.fullmatch(r"\s*[+-]?\d+,\d+\s*", cell) for cell in cells)
    point = any(re.fullmatch(r"\s*[+-]?\d+\.\d+\s*", cell) for cell in cells)
    return _Dialect(separator, "," if comma and not point else ".", names)


def _split(sample: str, separator: str) -> list[list[str]]:
    lines = csv.reader(io.StringIO(sample), delimiter=separator, skipinitialspace=True)
    with contextlib.suppress(csv.Error):
        return [line for line, _ in zip((line for line in lines if line), range(SAMPLE_LINES), strict=False)]
    return [[sample.partition("\n")[0]]]


def _cut_by_blanks(sample: str) -> bool:
    widths = {len(line.split()) for line in sample.splitlines()[:SAMPLE_LINES] if line.strip()}
    return len(widths) == 1 and widths != {1}


def _bad_encoding(path: Path) -> TableFileError:
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return TableFileError(
                    path,
                    f"line {number} is not UTF-8: byte 0x{line[error.start]:02x} at position "
                    f"{error.start + 1} of the line (byte {offset + error.start} of the file); save the file as UTF-8.",
                )
            offset += len(line)
    return TableFileError(path, "the file is not UTF-8; save it as UTF-8.")


def _parquet(
    path: Path, rows: int | None, kinds: Mapping[str, str], columns: Sequence[str] | None
) -> Iterator[DataFrame]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
            _check_names(path, file.schema_arrow.names)
            if rows is None:
                yield file.read(columns=_ordered(columns, file.schema_arrow.names)).to_pandas()
                return
            for batch in file.iter_batches(rows, columns=_ordered(columns, file.schema_arrow.names)):
                frame = pyarrow.Table.from_batches([batch]).to_pandas()
                del batch
                # Arrow keeps what it has once taken, twice as much as it uses.
                pyarrow.default_memory_pool().release_unused()
                yield frame
    except (pyarrow.ArrowException, OSError) as error:
        raise _incomplete(path, "parquet", error) from None


def _ordered(columns: Sequence[str] | None, there: Sequence[str]) -> list[str] | None:
    return None if columns is None else [name for name in there if name in set(columns)]


def _feather(
    path: Path, rows: int | None, kinds: Mapping[str, str], columns: Sequence[str] | None
) -> Iterator[DataFrame]:
    import pyarrow
    from pyarrow import ipc

    try:
        with pyarrow.memory_map(str(path)) as source, ipc.open_file(source) as file:
            _check_names(path, file.schema.names)
            some = _ordered(columns, file.schema.names) or list(file.schema.names)
            if rows is None:
                yield file.read_all().select(some).to_pandas()
                return
            for index in range(file.num_record_batches):
                batch = file.get_batch(index).select(some)
                for start in range(0, batch.num_rows, rows):
                    yield pyarrow.Table.from_batches([batch.slice(start, rows)]).to_pandas()
    except (pyarrow.ArrowException, OSError) as error:
        raise _incomplete(path, "feather", error) from None


def _incomplete(path: Path, kind: str, error: Exception) -> TableFileError:
    return TableFileError(path, f"the file is no complete {kind.capitalize()} file: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or ["unreadable"])[0].rstrip(".")
    return f"{text}. Copy it again, or save it again."


# ---------------------------------------------------------------------------------------------- writing


class TableWriter:
    """Writes a table in chunks of rows; the file appears when all are written, or not at all.

    Args:
        path: CSV, Parquet or Feather, by its suffix; a missing folder is made.

    Raises:
        TableFileError: The suffix is another.
        OSError: The file cannot be written, with a reason that the user can act on. An older file is as it was.

    >>> import pandas, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with TableWriter(Path(folder.name) / "a.csv") as writer:
    ...     writer.write(pandas.DataFrame({"a": [1, 2]}))
    >>> read(Path(folder.name) / "a.csv")["a"].tolist()
    [1, 2]
    >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.kind = _format(self.path, "write")
        self.rows = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        self._file: Any = None
        self._arrow: Any = None
        self._schema: Any = None

    def __enter__(self) -> Self:
        """Open a file beside the final one."""
        try:
            if self.path.is_dir():
                raise IsADirectoryError(21, "is a folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "xb")
        except OSError as error:
            raise writing_error(self.path, error, 0) from error
        return self

    def write(self, frame: DataFrame) -> None:
        """Append rows; all frames have the columns of the first."""
        try:
            if self.kind == "csv":
                separator = "\t" if self.path.suffix.lower() == ".tsv" else ","
                text = frame.to_csv(index=False, header=self.rows == 0, sep=separator, lineterminator="\n")
                self._file.write(text.encode())
            else:
                self._write_arrow(frame)
        except OSError as error:
            raise writing_error(self.path, error, frame.memory_usage().sum()) from error
        self.rows += len(frame)

    def _write_arrow(self, frame: DataFrame) -> None:
        import pyarrow
        from pyarrow import ipc, parquet

        if self._arrow is None:
            table = pyarrow.Table.from_pandas(frame, preserve_index=False)
            self._schema = table.schema
            make = parquet.ParquetWriter if self.kind == "parquet" else ipc.new_file
            self._arrow = make(self._file, self._schema)
        else:
            try:
                table = pyarrow.Table.from_pandas(frame, schema=self._schema, preserve_index=False)
            except (pyarrow.ArrowException, TypeError) as error:
                raise TableFileError(
                    self.path, f"from row {self.rows + 1} on a column is of another type: {_first_line(error)}"
                ) from None
        self._arrow.write_table(table)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Move the file to its place where all went well, and remove it otherwise."""
        failure: OSError | None = None
        try:
            if self._arrow is not None:
                with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
                    self._arrow.close()
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
                self._file.close()
            if kind is None:
                os.replace(self._temporary, self.path)
        except OSError as found:
            failure = found
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
        if failure is not None:
            raise writing_error(self.path, failure, 0) from failure

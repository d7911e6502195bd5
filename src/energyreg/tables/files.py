"""Tables on disk: CSV, Parquet and Feather, read and written in chunks of rows, so that memory is bounded.

Everything that can be wrong with such a file is said in one line that names the file, the column and the row. Rows
count from 1, the header of a CSV is none.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from energyreg.errors import Located
from energyreg.files import remove_abandoned, temporary_path, writing_error
from energyreg.tables.delimited import COMPRESSED, csv_names, is_text, labels_in, read_csv
from energyreg.tables.file_errors import TableFileError, check_names, first_line

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
    "to_numbers",
    "typed_columns",
]

CHUNK_ROWS = 4_096
"""Rows that are in memory at once."""
FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".txt": "csv", ".parquet": "parquet", ".pq": "parquet", ".feather": "feather",
    ".arrow": "feather",
}  # fmt: skip
"""Suffixes of files, and what they hold; a CSV may be compressed."""
STREAM = "-"
"""What stands for standard output in place of a file; tables there are CSV."""
BUFFER_BYTES = 2**16
"""What is read of a column of a Parquet file at once, instead of the whole of its row group."""


# ---------------------------------------------------------------------------------------------- reading


def read(
    path: str | os.PathLike[str], *, kinds: Mapping[str, str] | None = None, missing: Sequence[str] = ()
) -> DataFrame:
    """Read a table whole; see :func:`read_chunks`."""
    frames = list(read_chunks(path, rows=None, kinds=kinds, missing=missing))
    import pandas  # afterwards: a missing file is said at once

    return frames[0] if len(frames) == 1 else pandas.concat(frames, ignore_index=True)


def read_chunks(
    path: str | os.PathLike[str],
    *,
    rows: int | None = CHUNK_ROWS,
    kinds: Mapping[str, str] | None = None,
    columns: Sequence[str] | None = None,
    missing: Sequence[str] = (),
) -> Iterator[DataFrame]:
    """Read a table in chunks of rows.

    Args:
        path: CSV (.csv, .tsv, .txt, also with .gz, .bz2 or .xz behind; UTF-8, any of the usual separators), Parquet
            (.parquet, .pq) or Feather (.feather, .arrow).
        rows: Rows of a chunk, at most; None for all at once.
        kinds: Column → what it holds: "number", "text", "boolean" or "time". A CSV does not say it, and a chunk of it
            may look otherwise than the whole; columns that are not named are judged by their values.
        columns: Columns to read, which the file must have; by default all. The first column of a CSV, where it has no
            name, is the rows' index and left out.
        missing: Cells that stand for a missing value, besides the usual ones.

    Yields:
        Frames with these columns, in the order of the file, at least one row each. Columns of a CSV in which a cell is
        no number or no date are text.

    Raises:
        FileNotFoundError: There is no such file.
        TableFileError: The file is empty, damaged or of another kind, or has a column without a name or a name twice.
    """
    path, kind = Path(path), check_readable(path)
    reader = {"csv": read_csv, "parquet": _parquet, "feather": _feather}[kind]
    some = False
    for frame in reader(path, rows, kinds or {}, columns, missing):
        if len(frame) == 0:
            continue
        some = True
        yield frame if kind == "csv" or not missing else _without(frame, missing)
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
        return csv_names(path)
    with _complete(path, kind):  # names are decoded when they are asked for
        names = _names_of(_schema(path, kind))
        check_names(path, names)
        return names


def typed_columns(path: str | os.PathLike[str], what: str) -> list[str] | None:
    """Names of the columns that the file says to hold "text" or "time"; None for a CSV, which does not say it.

    Raises:
        FileNotFoundError: There is no such file.
        TableFileError: As :func:`read_chunks`.
    """
    path, kind = Path(path), check_readable(path)
    if kind == "csv":
        return None
    from pyarrow import types

    text = (types.is_string, types.is_large_string, types.is_string_view)
    tests = {"text": text, "time": (types.is_date, types.is_timestamp)}[what]
    with _complete(path, kind):
        return [str(field.name) for field in _schema(path, kind) if any(test(field.type) for test in tests)]


def _schema(path: Path, kind: str) -> Any:
    import pyarrow
    from pyarrow import ipc, parquet

    with _complete(path, kind):
        if kind == "parquet":
            with parquet.ParquetFile(path) as file:
                return file.schema_arrow
        with pyarrow.memory_map(str(path)) as source, ipc.open_file(source) as file:
            return file.schema


def _names_of(schema: Any) -> list[str]:
    """Names of the columns, without what pandas keeps as the index of the rows."""
    index = {name for name in (schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)}
    return [str(name) for name in schema.names if name not in index]


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


def to_numbers(series: Series) -> Any:
    """A column as float64, NaN where a cell is no number; numbers as people write them are read."""
    import numpy as np
    import pandas

    values = pandas.to_numeric(series, errors="coerce").astype(np.float64).to_numpy()
    if is_text(series) and np.isnan(values).any():
        from energyreg.tables.cells import Tally

        labels, tally = labels_in(series), Tally()
        tally.add(labels)
        reading = tally.reading()
        values = reading.read(labels)[0] if reading.kind == "number" else values
    return values


def error_about(
    error: Exception, path: Path, targets: Sequence[str], offset: int = 0, numbers: Sequence[int] | None = None
) -> TableFileError:
    """An error of the estimator in the words of the file: column names and rows from 1 instead of X, y and positions.

    Args:
        error: The error; one that does not say where it is keeps its words.
        path: The file.
        targets: Names of the target columns.
        offset: Rows of the file before X.
        numbers: Numbers of the rows of X in the file, where they do not follow each other.
    """
    if not isinstance(error, Located):
        return TableFileError(path, str(error))
    column = error.column
    if isinstance(column, int) and error.name.startswith("y") and column < len(targets):
        column = targets[column]
    name = {"X": "the table", "y": "the target"}.get(error.name, error.name)
    rows = [row + 1 + offset if numbers is None else int(numbers[row]) for row in error.rows]
    text = error.reworded(name=name, rows=rows, column=column)
    return TableFileError(path, text, row=rows[0] if rows else None, column=None if column is None else str(column))


def count_rows(path: str | os.PathLike[str]) -> int:
    """About how many rows a table has, without reading its values: for a CSV its lines; 0 where nobody knows."""
    path = Path(path)
    with contextlib.suppress(Exception):
        kind = _format(path, "read")
        if kind == "parquet":
            from pyarrow import parquet

            return int(parquet.ParquetFile(path).metadata.num_rows)
        if kind == "feather":
            import pyarrow
            from pyarrow import ipc

            with pyarrow.memory_map(str(path)) as source, ipc.open_file(source) as file:
                return sum(file.get_batch(i).num_rows for i in range(file.num_record_batches))
        if path.suffix.lower() in COMPRESSED:
            return 0
        with open(path, "rb") as lines:
            return max(sum(block.count(b"\n") for block in iter(lambda: lines.read(2**20), b"")) - 1, 0)
    return 0


def _format(path: Path, verb: str) -> str:
    bare = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    kind = FORMATS.get(bare.suffix.lower())
    if kind is None or (bare is not path and kind != "csv"):
        known = ", ".join(FORMATS) + ", or .csv.gz"
        what = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise TableFileError(path, f"cannot {verb} a file with {what}; expected one of {known}.")
    return kind


def _without(frame: DataFrame, missing: Sequence[str]) -> DataFrame:
    """A frame in which some cells count as missing."""
    import pandas

    words = {word.strip() for word in missing}
    numbers = set()
    for word in words:
        with contextlib.suppress(ValueError):
            numbers.add(float(word))
    for name in frame.columns:
        series = frame[name]
        if is_text(series) or isinstance(series.dtype, pandas.CategoricalDtype):
            frame[name] = series.mask(series.astype(str).str.strip().isin(words))
        elif pandas.api.types.is_numeric_dtype(series.dtype) and numbers:
            frame[name] = series.mask(series.isin(numbers))
    return frame


def _parquet(
    path: Path, rows: int | None, kinds: Mapping[str, str], columns: Sequence[str] | None, missing: Sequence[str]
) -> Iterator[DataFrame]:
    import pyarrow
    from pyarrow import parquet

    with _complete(path, "parquet"), parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
        check_names(path, file.schema_arrow.names)
        some = _ordered(columns, file.schema_arrow)
        if rows is None:
            yield _to_pandas(file.read(columns=some))
            return
        for batch in file.iter_batches(rows, columns=some):
            frame = _to_pandas(pyarrow.Table.from_batches([batch]))
            del batch
            # Arrow keeps what it has once taken, twice as much as it uses.
            pyarrow.default_memory_pool().release_unused()
            yield frame


def _ordered(columns: Sequence[str] | None, schema: Any) -> list[str]:
    return [name for name in _names_of(schema) if columns is None or name in set(columns)]


def _to_pandas(table: Any) -> DataFrame:
    """An Arrow table as a frame; whole numbers among which some are missing stay whole."""
    import pandas
    from pyarrow import types

    frame: DataFrame = table.to_pandas(ignore_metadata=True)
    for name, column in zip(table.column_names, table.columns, strict=True):
        if types.is_integer(column.type) and column.null_count:
            dtype = pandas.UInt64Dtype() if types.is_unsigned_integer(column.type) else pandas.Int64Dtype()
            frame[name] = column.to_pandas(types_mapper={column.type: dtype}.get)
    return frame


def _feather(
    path: Path, rows: int | None, kinds: Mapping[str, str], columns: Sequence[str] | None, missing: Sequence[str]
) -> Iterator[DataFrame]:
    import pyarrow
    from pyarrow import ipc

    with _complete(path, "feather"), pyarrow.memory_map(str(path)) as source, ipc.open_file(source) as file:
        check_names(path, file.schema.names)
        some = _ordered(columns, file.schema)
        if rows is None:
            yield _to_pandas(file.read_all().select(some))
            return
        for index in range(file.num_record_batches):
            batch = file.get_batch(index).select(some)
            for start in range(0, batch.num_rows, rows):
                yield _to_pandas(pyarrow.Table.from_batches([batch.slice(start, rows)]))


@contextlib.contextmanager
def _complete(path: Path, kind: str) -> Iterator[None]:
    """Whatever a damaged file makes pyarrow or pandas raise, as an error that names the file."""
    try:
        yield
    except (TableFileError, GeneratorExit, MemoryError):
        raise
    except Exception as error:
        # pyarrow raises its own errors, and UnicodeDecodeError, KeyError or others where names or metadata are damaged.
        raise TableFileError(path, f"the file is no complete {kind.capitalize()} file: {first_line(error)}") from None


# ---------------------------------------------------------------------------------------------- writing


class TableWriter:
    """Writes a table in chunks of rows; the file appears when all are written, or not at all.

    Args:
        path: CSV, Parquet or Feather, by its suffix; a missing folder is made. "-" is standard output, as CSV, where
            rows appear at once.

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
        self.is_stream = str(path) == STREAM
        self.kind = "csv" if self.is_stream else _format(self.path, "write")
        self.rows = 0
        self._temporary = temporary_path(self.path)
        self._file: Any = None
        self._raw: Any = None
        self._arrow: Any = None
        self._schema: Any = None

    def __enter__(self) -> Self:
        """Open a file beside the final one."""
        if self.is_stream:
            return self
        try:
            if self.path.is_dir():
                raise IsADirectoryError(21, "is a folder")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.path)
            module = COMPRESSED.get(self.path.suffix.lower())
            self._raw = open(self._temporary, "xb")
            self._file = self._raw if module is None else importlib.import_module(module).open(self._raw, "wb")
        except OSError as error:
            raise writing_error(self.path, error, 0) from error
        return self

    def write(self, frame: DataFrame) -> None:
        """Append rows; all frames have the columns of the first."""
        try:
            if self.kind == "csv":
                separator = "\t" if ".tsv" in self.path.suffixes[-2:] else ","
                text = frame.to_csv(index=False, header=self.rows == 0, sep=separator, lineterminator="\n")
                if self.is_stream:
                    sys.stdout.write(text)
                    sys.stdout.flush()
                else:
                    self._file.write(text.encode())
            else:
                self._write_arrow(frame)
        except OSError as error:
            if self.is_stream:
                raise
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
                    self.path, f"from row {self.rows + 1} on a column is of another type: {first_line(error)}"
                ) from None
        self._arrow.write_table(table)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Move the file to its place where all went well, and remove it otherwise."""
        if self.is_stream:
            return
        failure: OSError | None = None
        try:
            if self._arrow is not None:
                with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
                    self._arrow.close()
            if self._file is not self._raw and kind is None:
                self._file.close()
            if kind is None:
                self._raw.flush()
                os.fsync(self._raw.fileno())
            with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():
                self._file.close()
            if kind is None:
                os.replace(self._temporary, self.path)
        except OSError as found:
            failure = found
        finally:
            for file in (self._file, self._raw):
                with contextlib.suppress(OSError, ValueError):
                    file.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
        if failure is not None:
            raise writing_error(self.path, failure, 0) from failure

"""Tables that the user names: their inputs and targets, and errors in the words of the file."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energyreg.cli.console import InputError
from energyreg.errors import Located

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

__all__ = ["about", "about_images", "image_files", "in_words", "local", "present", "target_columns"]


def present(frame: DataFrame, names: Sequence[str], path: Path, why: str) -> list[str]:
    """Names of columns, which the table must have.

    Raises:
        InputError: If it lacks one; it says why the column is needed.
    """
    missing = [name for name in names if name not in frame.columns]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        there = ", ".join(repr(str(name)) for name in list(frame.columns)[:8])
        there += ", ..." if len(frame.columns) > 8 else ""
        raise InputError(f"{path}: there is no column {missing[0]!r}{more} that {why}; the columns are {there}.")
    return list(names)


def image_files(frame: DataFrame, column: str, path: Path, why: str) -> DataFrame:
    """The column of files, which start at the folder of the table."""
    files = frame[present(frame, [column], path, why)]
    return files.assign(**{column: [path.parent / name if isinstance(name, str) else None for name in files[column]]})


def target_columns(frame: DataFrame, names: Sequence[str], path: Path, offset: int = 0) -> np.ndarray:
    """Target columns as numbers, shape (B, D); an error names the first value that is none."""
    import numpy as np
    import pandas

    from energyreg.tables.file_errors import describe_value
    from energyreg.tables.files import to_numbers

    columns = []
    for name in present(frame, names, path, "holds the target"):
        series = frame[name]
        values = to_numbers(series)
        bad = ~np.isfinite(values)
        if not pandas.api.types.is_numeric_dtype(series.dtype) and series.dtype != object:
            text = bad & series.notna().to_numpy()
            if pandas.api.types.is_datetime64_any_dtype(series.dtype):
                text, bad = np.ones(len(values), bool), np.ones(len(values), bool)
            bad = text if text.any() else bad
        if bad.any():
            row = int(bad.argmax())
            found = describe_value(series.iloc[row])
            raise InputError(
                f"{path}: the target column {name!r} has {found} in row {offset + row + 1} ({int(bad.sum())} such "
                f"value{'s' * (int(bad.sum()) > 1)}); expected numbers. Fill in or drop these rows."
            )
        columns.append(values)
    return np.stack(columns, 1)


@contextlib.contextmanager
def about(
    path: Path,
    targets: Sequence[str],
    numbers: Sequence[int] | None = None,
    *,
    strict: bool = False,
    said: dict[str, str] | None = None,
) -> Iterator[None]:
    """Words for what the estimator says: file, column names and rows of the file instead of X, y and positions.

    Args:
        path: The file.
        targets: Names of the target columns.
        numbers: Numbers of the rows in the file; from 1 by default.
        strict: Whether odd cells are an error.
        said: Column → what was said of its cells, which is said once.
    """
    from energyreg.files import CheckpointError
    from energyreg.tables.cells import CellWarning, ColumnWarning
    from energyreg.tables.files import TableFileError, error_about

    show_plain = warnings.showwarning
    known: dict[str, str] = {} if said is None else said

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if isinstance(message, CellWarning):
            text = str(error_about(message.error, path, targets, numbers=numbers))
            if strict:
                raise InputError(f"{text.rstrip('.')}, which --strict refuses.")
            if known.setdefault(str(message.error.column), text) is not text:
                return
            message = CellWarning(message.error, text)
        elif isinstance(message, ColumnWarning):
            known[""] = str(message)
        show_plain(message, category, *rest, **more)

    warnings.showwarning = show
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, (CheckpointError, TableFileError, InputError)):
            raise
        raise InputError(str(error_about(error, path, targets, numbers=numbers))) from error
    finally:
        warnings.showwarning = show_plain


_SPOOLED: list[tempfile.TemporaryDirectory[str]] = []


def local(path: Path) -> Path:
    """A file to read; for "-" one with what comes from standard input, which is read several times.

    The first bytes say whether it is Parquet, Feather, or a CSV, compressed or not.
    """
    if str(path) != "-":
        return path
    folder = tempfile.TemporaryDirectory(prefix="energyreg-", ignore_cleanup_errors=True)
    _SPOOLED.append(folder)  # until the process ends
    stream = sys.stdin.buffer
    start = stream.read(6)
    suffixes = {
        b"PAR1": ".parquet", b"ARROW1": ".feather", b"\x1f\x8b": ".csv.gz", b"BZh": ".csv.bz2", b"\xfd7zXZ": ".csv.xz",
    }  # fmt: skip
    suffix = next((suffix for magic, suffix in suffixes.items() if start.startswith(magic)), ".csv")
    spooled = Path(folder.name) / f"standard-input{suffix}"
    with open(spooled, "wb") as file:
        file.write(start)
        shutil.copyfileobj(stream, file)
    return spooled


def in_words(message: str) -> str:
    """A message in which the copy of standard input has no path."""
    for folder in _SPOOLED:
        message = re.sub(re.escape(folder.name) + r"\S*?standard-input[.a-z0-9]*[a-z0-9]", "standard input", message)
    return message


@contextlib.contextmanager
def about_images(
    path: Path,
    files: DataFrame,
    targets: Sequence[str],
    numbers: Sequence[int],
    *,
    fitting: bool = False,
    **options: Any,
) -> Iterator[None]:
    """As `about` for a column of files, in rows of the table with these numbers."""
    from energyreg.images.reading import ImageFileError

    column = str(files.columns[0])
    with about(path, targets, **options):
        try:
            yield
        except ImageFileError as error:
            rows = [number for number, file in zip(numbers, files[column], strict=True) if str(file) == error.path]
            text = error.reworded(advice=", or pass --on-error skip" if fitting else "")
            raise InputError(f"{path}: {f'row {rows[0]}: ' if rows else ''}{text}") from error
        except Located as error:
            if error.name != "files":
                raise
            rows = [numbers[row] for row in error.rows]
            raise InputError(f"{path}: {error.reworded(name=f'column {column!r}', rows=rows, advice='')}") from error

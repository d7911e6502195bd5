"""Tables that the user names: their inputs and targets, and errors in the words of the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from energyreg.cli.console import InputError
from energyreg.errors import Located

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

__all__ = ["about", "about_images", "image_files", "present", "target_columns"]


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

    from energyreg.tables.files import describe_value

    columns = []
    for name in present(frame, names, path, "holds the target"):
        series = frame[name]
        values = pandas.to_numeric(series, errors="coerce").astype(np.float64).to_numpy()
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
def about(path: Path, targets: Sequence[str], offset: int = 0) -> Iterator[None]:
    """Words for the errors of the estimator: file, column names and rows of the file instead of X, y and positions."""
    try:
        yield
    except (ValueError, TypeError) as error:
        from energyreg.files import CheckpointError
        from energyreg.tables.files import TableFileError, error_about

        if isinstance(error, (CheckpointError, TableFileError, InputError)):
            raise
        raise InputError(str(error_about(error, path, targets, offset))) from error


@contextlib.contextmanager
def about_images(
    path: Path, files: DataFrame, targets: Sequence[str], numbers: Sequence[int], *, fitting: bool = False
) -> Iterator[None]:
    """As `about` for a column of files, in rows of the table with these numbers."""
    from energyreg.images.reading import ImageFileError

    column = str(files.columns[0])
    with about(path, targets):
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

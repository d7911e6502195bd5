"""Columns of a table of any kind: NumPy arrays, pandas and polars frames, Arrow tables.

The library that a table comes from is not imported here: a table brings its own.
"""

from __future__ import annotations

import datetime
import math
import warnings
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from energyreg.errors import DataError, DataTypeError

__all__ = ["KINDS", "Column", "column_names", "labels_of", "read_columns", "tensor_to_array"]

LARGEST_WHOLE = 2**53
KINDS = {"number": "numbers", "text": "text", "boolean": "booleans", "time": "dates", "duration": "durations"}
"""Kinds of columns, and what an error calls their values; "missing" has no value at all."""


@dataclass
class Column:
    """One column as it was read.

    Attributes:
        kind: "number", "text", "boolean", "time", "duration" or "missing".
        values: Numbers as float64 (times in microseconds since 1970, durations in seconds) with NaN where missing;
            text and booleans as labels in an object array with None where missing.
        categorical: Whether its values are categories, whatever their kind.
    """

    kind: str
    values: np.ndarray
    categorical: bool = False

    def missing(self) -> np.ndarray:
        """Which values are missing, shape (N,)."""
        if self.values.dtype == object:
            return np.fromiter((value is None for value in self.values), bool, len(self.values))
        return np.isnan(self.values)


def column_names(table: Any, name: str = "X") -> list[Any] | None:
    """Names of the columns of a pandas, polars or Arrow table, as they are; None where columns have no names.

    Raises:
        TypeError: If it is a frame whose rows are not there yet.
    """
    if isinstance(table, np.ndarray) or not (hasattr(type(table), "columns") or hasattr(table, "columns")):
        return None
    shape = getattr(table, "shape", None)
    if not (isinstance(shape, tuple) and all(isinstance(size, int) for size in shape)):
        raise DataTypeError(
            "{name} is a {kind}, whose rows are not in memory; expected an array or a data frame. Pass "
            "{name}.collect(), or what else turns it into one.",
            name=name, kind=f"{type(table).__module__.partition('.')[0]}.{type(table).__name__}",
        )  # fmt: skip
    names = table.column_names if hasattr(table, "column_names") else table.columns
    return list(names)


def read_columns(table: Any, name: str) -> tuple[list[str] | None, list[Column], int]:
    """Names, columns and number of rows of a table.

    Raises:
        ValueError: If it is no table of two dimensions, is empty or sparse, has a name twice, or a column mixes kinds
            or holds infinite values.
        TypeError: If it holds something that is no number, text, boolean, date or duration.
    """
    if hasattr(table, "toarray") and hasattr(table, "nnz"):
        raise DataTypeError(
            "{name} is a sparse matrix ({kind}); expected a dense table. Convert it by {name}.toarray() if it fits "
            "into memory, or keep fewer columns.",
            name=name, kind=type(table).__name__,
        )  # fmt: skip
    if isinstance(table, (str, bytes)) or table is None:
        raise DataError(
            "{name} is {table!r}; expected an array or a data frame. Read the file first, e.g. by pandas.read_csv.",
            name=name, table=table,
        )  # fmt: skip
    names = column_names(table, name)
    if names is not None:
        return _read_frame(table, names, name)
    array = _to_array(table, name)
    if array.ndim != 2:
        raise DataError(
            "Expected 2D array, got {ndim}D array instead: {name} has shape {shape}; expected (rows, columns). Reshape "
            "your data: a single feature by X.reshape(-1, 1), a single row by X.reshape(1, -1).",
            name=name, ndim=array.ndim, shape=array.shape,
        )  # fmt: skip
    _check_size(len(array), array.shape[1], name)
    columns = [_from_array(array[:, i], i, name) for i in range(array.shape[1])]
    return None, columns, len(array)


def tensor_to_array(tensor: Any, name: str) -> np.ndarray:
    """A torch tensor on any device, of any dtype that torch can turn into numbers.

    Raises:
        TypeError: If it is sparse.
    """
    if str(tensor.layout) != "torch.strided":
        text = "{name} is a sparse matrix ({layout}); expected a dense tensor. Convert it by {name}.to_dense()."
        raise DataTypeError(text, name=name, layout=tensor.layout)
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        return np.asarray(tensor.numpy())
    except TypeError:  # a dtype that NumPy does not know, such as bfloat16
        return np.asarray(tensor.double().numpy())


def _to_array(table: Any, name: str) -> np.ndarray:
    if hasattr(table, "detach") and hasattr(table, "layout"):
        return tensor_to_array(table, name)
    if isinstance(table, np.ma.MaskedArray):  # what is masked is missing
        numeric = table.dtype.kind in "iuf"
        array = np.array(table.data, float if numeric else object)
        array[np.ma.getmaskarray(table)] = np.nan if numeric else None
        return array
    try:
        array = np.asarray(table)
        if array.dtype.kind in "US" and not hasattr(table, "dtype"):
            array = np.asarray(table, dtype=object)  # NumPy would turn the numbers of a list with text into text
    except ValueError as error:  # rows of different length
        text = "{name} is no table: {reason}. Expected rows of the same length."
        raise DataError(text, name=name, reason=error) from None
    return array


def _check_size(rows: int, columns: int, name: str) -> None:
    if rows == 0:
        text = "Found array with 0 sample(s) (shape=(0, {columns})): {name} has no rows; pass some."
        raise DataError(text, name=name, columns=columns)
    if columns == 0:
        raise DataError(
            "{name} has no columns: 0 feature(s) (shape=({count}, 0)) while a minimum of 1 is required. Pass at least "
            "one column.",
            name=name, count=rows,
        )  # fmt: skip


def _read_frame(table: Any, names: list[Any], name: str) -> tuple[list[str], list[Column], int]:
    text = [str(column) for column in names]
    twice = sorted({column for column in text if text.count(column) > 1}) if len(set(text)) < len(text) else []
    if twice:
        raise DataError(
            "{name} has the column name {column!r} {times} times; expected names that differ. Rename or drop columns.",
            name=name, column=twice[0], times=text.count(twice[0]),
        )  # fmt: skip
    rows = int(table.shape[0])
    _check_size(rows, len(names), name)
    library = type(table).__module__.partition(".")[0]
    columns = []
    for i, column in enumerate(text):
        if library == "polars":
            columns.append(_from_polars(table.to_series(i), column, name))
        elif library == "pyarrow":
            columns.append(_from_arrow(table.column(i), column, name))
        else:
            columns.append(_from_pandas(table.iloc[:, i], column, name))
    return text, columns, rows


def _from_pandas(series: Any, column: str, name: str) -> Column:
    from pandas import ArrowDtype, CategoricalDtype
    from pandas.api import types

    dtype = series.dtype
    if isinstance(dtype, CategoricalDtype):
        values = np.asarray(series.cat.categories.astype(object), object)
        categories = _from_array(values, column, name)
        whole = all(isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in values)
        # Labels such as numbers of accounts have more digits than a float.
        labels = np.array([str(int(value)) for value in values], object) if whole else labels_of(categories)
        codes = series.cat.codes.to_numpy()
        values = np.concatenate([labels, np.array([None], object)])[codes]  # code -1, missing, takes the last
        return Column(categories.kind if len(labels) else "missing", values, categorical=True)
    if isinstance(dtype, ArrowDtype) and (dtype.kind == "O" or str(dtype).startswith("date")):
        # Dates and clock times, for which pandas has no dtype of its own.
        import pyarrow

        return _from_arrow(pyarrow.array(series), column, name)
    if types.is_datetime64_any_dtype(dtype):
        # Local time: the hour of the day there is what a model can learn from.
        series = series.dt.tz_localize(None) if getattr(series.dt, "tz", None) is not None else series
        return _from_array(series.to_numpy("datetime64[us]"), column, name)
    if types.is_timedelta64_dtype(dtype):
        return _from_array(series.to_numpy("timedelta64[us]"), column, name)
    if types.is_bool_dtype(dtype):
        return _from_array(series.to_numpy(object), column, name)
    if types.is_complex_dtype(dtype):
        return _from_array(series.to_numpy(), column, name)
    if types.is_numeric_dtype(dtype):
        _warn_about_digits(series, types.is_integer_dtype(dtype), column, name)
        return _from_array(series.to_numpy(np.float64, na_value=np.nan), column, name)
    if hasattr(series, "dt") and hasattr(series.dt, "to_timestamp"):  # periods
        return _from_array(series.dt.to_timestamp().to_numpy("datetime64[us]"), column, name)
    return _from_array(series.to_numpy(object), column, name)


def _from_polars(series: Any, column: str, name: str) -> Column:
    kind, categorical = str(series.dtype.base_type()), False
    if kind in ("Categorical", "Enum"):
        series, categorical = series.cast(_polars("String")), True
    elif kind in ("Date", "Datetime", "Duration"):
        series = series.cast(_polars("Datetime")("us")) if kind == "Date" else series.dt.cast_time_unit("us")
        if getattr(series.dtype, "time_zone", None) is not None:
            series = series.dt.replace_time_zone(None)  # local time, as from pandas
        numbers = series.to_physical().cast(_polars("Float64")).to_numpy().astype(np.float64)
        return Column("duration", numbers / 1e6) if kind == "Duration" else Column("time", numbers)
    elif kind == "Time":
        return Column("duration", series.to_physical().cast(_polars("Float64")).to_numpy().astype(np.float64) / 1e9)
    elif series.dtype.is_numeric():
        _warn_about_digits(series, series.dtype.is_integer(), column, name)
        return _from_array(series.cast(_polars("Float64")).to_numpy(), column, name)
    values = np.empty(len(series), object)
    values[:] = series.to_list()
    read = _from_array(values, column, name)
    return Column(read.kind, read.values, categorical or read.categorical)


def _polars(name: str) -> Any:
    import polars

    return getattr(polars, name)


def _from_arrow(array: Any, column: str, name: str) -> Column:
    array = array.combine_chunks() if hasattr(array, "combine_chunks") else array
    dictionary = hasattr(array.type, "value_type") and hasattr(array, "dictionary_decode")
    array = array.dictionary_decode() if dictionary else array
    if getattr(array.type, "tz", None) is not None:
        import pyarrow.compute

        array = pyarrow.compute.local_timestamp(array)
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind in "Mm":
        values = values.astype(f"{values.dtype.kind}8[us]")
    read = _from_array(values, column, name)
    return Column(read.kind, np.asarray(labels_of(read)) if dictionary else read.values, dictionary or read.categorical)


def _from_array(values: np.ndarray, column: int | str, name: str) -> Column:
    """A column of a NumPy array of any dtype."""
    kind = values.dtype.kind
    if kind in "iuf" or values.dtype.name.startswith(("bfloat16", "float8", "float4", "float6")):
        _warn_about_digits(values, kind in "iu", column, name)
        numbers = values.astype(np.float64)
        _refuse_infinite(numbers, column, name)
        return Column("number", numbers)
    if kind == "b":
        return Column("boolean", np.where(values, "True", "False").astype(object), categorical=True)
    if kind == "c":
        raise DataError(
            "Complex data not supported: column {column!r} of {name} has dtype {dtype}. Pass real and imaginary part "
            "as columns of their own.",
            name=name, column=column, dtype=values.dtype,
        )  # fmt: skip
    if kind == "M":
        times = values.astype("datetime64[us]")
        return Column("time", np.where(np.isnat(times), np.nan, times.astype(np.int64).astype(np.float64)))
    if kind == "m":
        spans = values.astype("timedelta64[us]")
        return Column("duration", np.where(np.isnat(spans), np.nan, spans.astype(np.int64) / 1e6))
    if kind in "US":
        return _from_objects(values.astype(object), column, name)
    if kind == "O":
        return _from_objects(values, column, name)
    text = "column {column!r} of {name} has dtype {dtype}; expected numbers, text, booleans or dates."
    raise DataTypeError(text, name=name, column=column, dtype=values.dtype)


def _warn_about_digits(values: Any, whole: bool, column: int | str, name: str) -> None:
    """Whole numbers beyond 2⁵³ are rounded to float64, by which neighbours may become one."""
    if not whole or len(values) == 0:
        return
    low, high = values.min(), values.max()
    # Missing ones compare as False, or not at all.
    if low is None or type(low).__name__ == "NAType" or low != low or high != high:
        return
    if max(abs(int(low)), abs(int(high))) > LARGEST_WHOLE:
        big = int(low) if abs(int(low)) > abs(int(high)) else int(high)
        warnings.warn(
            f"column {column!r} of {name} has whole numbers beyond 2^53, such as {big}, which are rounded. Where they "
            "are labels, pass them as text or as a category.",
            stacklevel=2,
        )


def _refuse_infinite(numbers: np.ndarray, column: int | str, name: str) -> None:
    infinite = np.isinf(numbers)
    if infinite.any():
        raise DataError(
            "{name} has an infinite value (inf) in column {column!r}, row {row}, and {others} more in this column; "
            "expected finite numbers, or NaN where a value is missing. Replace them.",
            name=name, column=column, rows=[infinite.argmax()], others=int(infinite.sum()) - 1,
        )  # fmt: skip


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType", "MaskedConstant"):
        return True
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(value))
    return isinstance(value, (float, np.floating, Decimal)) and value != value


def _kind_of(value: Any) -> str | None:
    if isinstance(value, (str, bytes)) or type(value).__name__ == "Interval":  # the latter of pandas.cut
        return "text"
    if isinstance(value, (bool, np.bool_)):
        return "boolean"
    if isinstance(
        value, (datetime.timedelta, datetime.time, np.timedelta64)
    ):  # before numbers: NumPy's durations are such, too
        return "duration"
    if isinstance(value, (int, float, np.integer, np.floating, Decimal, Fraction)):
        return "number"
    if isinstance(value, (datetime.date, np.datetime64)):
        return "time"
    return None


def _from_objects(values: np.ndarray, column: int | str, name: str) -> Column:
    missing = np.fromiter((_is_missing(value) for value in values), bool, len(values))
    kinds: dict[str, int] = {}
    by_type: dict[type, str | None] = {}
    for row in np.flatnonzero(~missing):
        value = values[row]
        if type(value) not in by_type:
            kind = by_type[type(value)] = _kind_of(value)
            if isinstance(value, (complex, np.complexfloating)):
                text = "Complex data not supported: column {column!r} of {name} has {value!r} in row {row}."
                raise DataError(text, name=name, column=column, value=value, rows=[int(row)])
            if kind is None:
                raise DataTypeError(
                    "column {column!r} of {name} holds a {kind} in row {row}; the argument must be a table where each "
                    "value is a string, a number, a boolean or a date.",
                    name=name, column=column, kind=type(value).__name__, rows=[int(row)],
                )  # fmt: skip
            kinds.setdefault(kind, int(row))
    if not kinds:
        return Column("missing", np.full(len(values), np.nan))
    if set(kinds) == {"number", "boolean"}:
        kinds.pop("boolean")
    if len(kinds) == 2 and "text" in kinds:
        spoiled = _as_text(values, missing, by_type)
        if spoiled is not None:
            return spoiled
    if len(kinds) > 1:
        (first, here), (second, there) = list(kinds.items())[:2]
        raise DataError(
            "column {column!r} of {name} mixes {first} (row {rows[0]}: {values[0]!r}) with {second} (row {rows[1]}: "
            "{values[1]!r}); expected one kind. Convert the column.",
            name=name, column=column, first=KINDS[first], second=KINDS[second], rows=[here, there],
            values=[values[here], values[there]],
        )  # fmt: skip
    kind = next(iter(kinds))
    if kind in ("text", "boolean"):
        labels = np.empty(len(values), object)
        labels[~missing] = [_text(value) for value in values[~missing]]
        return Column(kind, labels, categorical=True)
    numbers = np.full(len(values), np.nan)
    convert = {"number": _number, "time": _microseconds, "duration": _seconds}[kind]
    for row in np.flatnonzero(~missing):
        try:
            numbers[row] = convert(values[row])
        except OverflowError:
            numbers[row] = np.inf
    _refuse_infinite(numbers, column, name)
    return Column(kind, numbers)


def _as_text(values: np.ndarray, missing: np.ndarray, kinds: dict[type, str | None]) -> Column | None:
    """A column of numbers or dates among which is some text, as text; None where it is too much to be an oversight."""
    from energyreg.tables.cells import Tally

    labels = np.full(len(values), None, object)
    tally = Tally()
    for row in np.flatnonzero(~missing):
        value = values[row]
        kind = kinds[type(value)]
        labels[row] = repr(float(value)) if kind == "number" else _text(value)
    tally.add(labels)
    reading = tally.reading()
    other = next(kind for kind in kinds.values() if kind not in ("text", "boolean", None))
    return Column("text", labels, categorical=True) if reading.kind == other else None


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return str(bool(value)) if isinstance(value, np.bool_) else str(value)


def _number(value: Any) -> float:
    return float(value)


def _microseconds(value: Any) -> float:
    if isinstance(value, datetime.datetime):
        value = value.replace(tzinfo=None)
    return float(np.datetime64(value, "us").astype(np.int64).item())


def _seconds(value: Any) -> float:
    if isinstance(value, datetime.time):  # since midnight
        return 3600.0 * value.hour + 60 * value.minute + value.second + value.microsecond / 1e6
    return float(np.timedelta64(value, "us").astype(np.int64)) / 1e6


def labels_of(column: Column) -> np.ndarray:
    """Values as text: 3 and 3.0 are one label."""
    if column.values.dtype == object:
        return column.values
    labels = np.empty(len(column.values), object)
    known, index = np.unique(column.values, return_inverse=True)
    text = np.array([None if math.isnan(v) else str(int(v)) if v == int(v) else repr(float(v)) for v in known], object)
    labels[:] = text[index]
    return labels

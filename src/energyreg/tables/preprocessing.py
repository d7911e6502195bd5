"""Tables: from columns of any kind to the one matrix of numbers that an encoder takes, learned on training rows only.

Numbers, categories, dates, durations and missing values, from NumPy arrays, pandas and polars frames and Arrow tables.
The library that a table comes from is not imported here: a table brings its own.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

__all__ = ["TablePreprocessor", "column_names", "read_targets"]

MICROSECONDS_PER_DAY = 86_400e6
EPOCH_WEEKDAY = 3
"""1970-01-01 was a Thursday, day 3 from Monday on."""

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


# ---------------------------------------------------------------------------------------------- reading


def column_names(table: Any) -> list[Any] | None:
    """Names of the columns of a pandas, polars or Arrow table, as they are; None where columns have no names."""
    if isinstance(table, np.ndarray) or not hasattr(table, "columns"):
        return None
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
        raise TypeError(
            f"{name} is a sparse matrix ({type(table).__name__}); expected a dense table. Convert it by "
            f"{name}.toarray() if it fits into memory, or keep fewer columns."
        )
    if isinstance(table, (str, bytes)) or table is None:
        raise ValueError(
            f"{name} is {table!r}; expected an array or a data frame. Read the file first, e.g. by pandas.read_csv."
        )
    names = column_names(table)
    if names is not None:
        return _read_frame(table, names, name)
    if isinstance(getattr(table, "dtype", None), np.dtype) or not hasattr(table, "numpy"):
        array = _to_array(table, name)
    else:  # a torch tensor, on any device
        array = table.detach().cpu().numpy()
    if array.ndim != 2:
        one = "a single feature by X.reshape(-1, 1), a single row by X.reshape(1, -1)"
        raise ValueError(
            f"Expected 2D array, got {array.ndim}D array instead: {name} has shape {array.shape}; expected (rows, "
            f"columns). Reshape your data: {one}."
        )
    _check_size(len(array), array.shape[1], name)
    columns = [_from_array(array[:, i], f"column {i}", name) for i in range(array.shape[1])]
    return None, columns, len(array)


def _to_array(table: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(table)
        if array.dtype.kind in "US" and not hasattr(table, "dtype"):
            array = np.asarray(table, dtype=object)  # NumPy would turn the numbers of a list with text into text
    except ValueError as error:  # rows of different length
        raise ValueError(f"{name} is no table: {error}. Expected rows of the same length.") from None
    return array


def _check_size(rows: int, columns: int, name: str) -> None:
    if rows == 0:
        raise ValueError(f"Found array with 0 sample(s) (shape=({rows}, {columns})): {name} has no rows; pass some.")
    if columns == 0:
        raise ValueError(
            f"{name} has no columns: 0 feature(s) (shape=({rows}, 0)) while a minimum of 1 is required. Pass at least "
            "one column."
        )


def _read_frame(table: Any, names: list[Any], name: str) -> tuple[list[str], list[Column], int]:
    text = [str(column) for column in names]
    twice = sorted({column for column in text if text.count(column) > 1}) if len(set(text)) < len(text) else []
    if twice:
        raise ValueError(
            f"{name} has the column name {twice[0]!r} {text.count(twice[0])} times; expected names that differ. Rename "
            "or drop columns."
        )
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
    from pandas import CategoricalDtype
    from pandas.api import types

    dtype = series.dtype
    if isinstance(dtype, CategoricalDtype):
        categories = _from_array(np.asarray(series.cat.categories.astype(object), object), _quoted(column), name)
        labels = _labels(categories)
        codes = series.cat.codes.to_numpy()
        values = np.concatenate([labels, np.array([None], object)])[codes]  # code -1, missing, takes the last
        return Column(categories.kind if len(labels) else "missing", values, categorical=True)
    if types.is_datetime64_any_dtype(dtype):
        # Local time: the hour of the day there is what a model can learn from.
        series = series.dt.tz_localize(None) if getattr(series.dt, "tz", None) is not None else series
        return _from_array(series.to_numpy("datetime64[us]"), _quoted(column), name)
    if types.is_timedelta64_dtype(dtype):
        return _from_array(series.to_numpy("timedelta64[us]"), _quoted(column), name)
    if types.is_bool_dtype(dtype):
        return _from_array(series.to_numpy(object), _quoted(column), name)
    if types.is_complex_dtype(dtype):
        return _from_array(series.to_numpy(), _quoted(column), name)
    if types.is_numeric_dtype(dtype):
        return _from_array(series.to_numpy(np.float64, na_value=np.nan), _quoted(column), name)
    if hasattr(series, "dt") and hasattr(series.dt, "to_timestamp"):  # periods
        return _from_array(series.dt.to_timestamp().to_numpy("datetime64[us]"), _quoted(column), name)
    return _from_array(series.to_numpy(object), _quoted(column), name)


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
        return _from_array(series.cast(_polars("Float64")).to_numpy(), _quoted(column), name)
    values = np.empty(len(series), object)
    values[:] = series.to_list()
    read = _from_array(values, _quoted(column), name)
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
    read = _from_array(values, _quoted(column), name)
    return Column(read.kind, np.asarray(_labels(read)) if dictionary else read.values, dictionary or read.categorical)


def _quoted(column: str) -> str:
    return f"column {column!r}"


def _from_array(values: np.ndarray, where: str, name: str) -> Column:
    """A column of a NumPy array of any dtype; where: what an error calls it."""
    kind = values.dtype.kind
    if kind in "iuf":
        numbers = values.astype(np.float64)
        _refuse_infinite(numbers, where, name)
        return Column("number", numbers)
    if kind == "b":
        return Column("boolean", np.where(values, "True", "False").astype(object), categorical=True)
    if kind == "c":
        raise ValueError(
            f"Complex data not supported: {where} of {name} has dtype {values.dtype}. Pass real and imaginary part as "
            "columns of their own."
        )
    if kind == "M":
        times = values.astype("datetime64[us]")
        return Column("time", np.where(np.isnat(times), np.nan, times.astype(np.int64).astype(np.float64)))
    if kind == "m":
        spans = values.astype("timedelta64[us]")
        return Column("duration", np.where(np.isnat(spans), np.nan, spans.astype(np.int64) / 1e6))
    if kind in "US":
        return _from_objects(values.astype(object), where, name)
    if kind == "O":
        return _from_objects(values, where, name)
    raise TypeError(f"{where} of {name} has dtype {values.dtype}; expected numbers, text, booleans or dates.")


def _refuse_infinite(numbers: np.ndarray, where: str, name: str) -> None:
    infinite = np.isinf(numbers)
    if infinite.any():
        row = int(infinite.argmax())
        raise ValueError(
            f"{name} has an infinite value (inf) in {where}, row {row}, and {int(infinite.sum()) - 1} more in this "
            "column; expected finite numbers, or NaN where a value is missing. Replace them."
        )


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(value))
    return isinstance(value, (float, np.floating, Decimal)) and value != value


def _kind_of(value: Any) -> str | None:
    if isinstance(value, (str, bytes)):
        return "text"
    if isinstance(value, (bool, np.bool_)):
        return "boolean"
    if isinstance(value, (datetime.timedelta, np.timedelta64)):  # before numbers: NumPy's durations are such, too
        return "duration"
    if isinstance(value, (int, float, np.integer, np.floating, Decimal, Fraction)):
        return "number"
    if isinstance(value, (datetime.date, np.datetime64)):
        return "time"
    return None


def _from_objects(values: np.ndarray, where: str, name: str) -> Column:
    missing = np.fromiter((_is_missing(value) for value in values), bool, len(values))
    kinds: dict[str, int] = {}
    by_type: dict[type, str | None] = {}
    for row in np.flatnonzero(~missing):
        value = values[row]
        if type(value) not in by_type:
            kind = by_type[type(value)] = _kind_of(value)
            if isinstance(value, (complex, np.complexfloating)):
                raise ValueError(f"Complex data not supported: {where} of {name} has {value!r} in row {row}.")
            if kind is None:
                raise TypeError(
                    f"{where} of {name} holds a {type(value).__name__} in row {row}; the argument must be a table "
                    "where each value is a string, a number, a boolean or a date."
                )
            kinds.setdefault(kind, int(row))
    if not kinds:
        return Column("missing", np.full(len(values), np.nan))
    if set(kinds) == {"number", "boolean"}:
        kinds.pop("boolean")
    if len(kinds) > 1:
        (first, here), (second, there) = list(kinds.items())[:2]
        raise ValueError(
            f"{where} of {name} mixes {KINDS[first]} (row {here}: {values[here]!r}) with {KINDS[second]} (row {there}: "
            f"{values[there]!r}); expected one kind. Convert the column."
        )
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
    _refuse_infinite(numbers, where, name)
    return Column(kind, numbers)


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
    return float(np.timedelta64(value, "us").astype(np.int64)) / 1e6


def _labels(column: Column) -> np.ndarray:
    """Values as text: 3 and 3.0 are one label."""
    if column.values.dtype == object:
        return column.values
    labels = np.empty(len(column.values), object)
    known, index = np.unique(column.values, return_inverse=True)
    text = np.array([None if math.isnan(v) else str(int(v)) if v == int(v) else repr(float(v)) for v in known], object)
    labels[:] = text[index]
    return labels


# ---------------------------------------------------------------------------------------------- what is learned


def _clock(part: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def of_known(microseconds: np.ndarray) -> np.ndarray:
        result = np.full(len(microseconds), np.nan)
        known = ~np.isnan(microseconds)
        result[known] = part(microseconds[known])
        return result

    return of_known


def _day_of_year(microseconds: np.ndarray) -> np.ndarray:
    days = microseconds.astype(np.int64).astype("datetime64[us]").astype("datetime64[D]")
    return (days - days.astype("datetime64[Y]")).astype(np.float64)


PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "value": lambda values: values,
    "days": lambda values: values / MICROSECONDS_PER_DAY,
    "day of the year": _clock(_day_of_year),
    "weekday": _clock(lambda values: (np.floor(values / MICROSECONDS_PER_DAY) + EPOCH_WEEKDAY) % 7),
    "hour": _clock(lambda values: values % MICROSECONDS_PER_DAY / 3600e6),
}
"""Numbers that a column can be turned into."""
TIME_PARTS = ("days", "day of the year", "weekday", "hour")


@dataclass
class _Number:
    """A column of numbers that goes to the encoder: (part - centre) / scale, clipped to the range of training."""

    part: str
    centre: float
    scale: float
    low: float
    high: float


@dataclass
class _Plan:
    """What becomes of one column of the table.

    Attributes:
        kind: Its kind in training.
        categorical: Whether its values are categories.
        numbers: Numbers that it gives.
        indicator: Whether a code says if its value is missing.
        levels: Labels with a code of their own, from 1 on, the most frequent first; None for a column of numbers.
        missing_level: Whether the last code stands for missing values.
    """

    kind: str
    categorical: bool = False
    numbers: list[_Number] = field(default_factory=list)
    indicator: bool = False
    levels: list[str] | None = None
    missing_level: bool = False

    @property
    def cardinalities(self) -> list[int]:
        """Codes of each column of categories that it gives."""
        if self.levels is not None:
            return [1 + len(self.levels) + self.missing_level]
        return [2] if self.indicator else []


class TablePreprocessor:
    """Turns a table into one matrix: numbers first, then categories as codes, float32.

    Numbers (integers, floats, decimals, durations) keep their order and are clipped to the range seen in training, so
    that a wild value counts as the largest one there was. A missing number takes the median, and a code of its own says
    so. Text, booleans and columns of a categorical dtype become codes, the most frequent first; labels that are rarer
    than `min_count`, or beyond `max_levels`, share code 0 with labels that were never seen. A date gives its day, its
    day of the year, its weekday and its hour, as far as they vary. Columns with one value, or none, are dropped.

    Args:
        max_levels: Labels of a column that get a code of their own, at most.
        min_count: Training rows that a label must have for that.

    Attributes:
        names_: Names of the columns in training, or None.
        num_columns_: How many columns there were.
        num_numeric_: Columns of numbers in the matrix, the first.
        cardinalities_: Codes of each of the other columns.
        features_: What each column of the matrix holds, in words.
        notes_: What was dropped, and why, one sentence each.

    Raises:
        ValueError: If an argument is out of its range.

    >>> table = np.array([[1.0, "red"], [2.0, "blue"], [None, "red"], [4.0, "blue"]], dtype=object)
    >>> preprocessor = TablePreprocessor(min_count=1).fit(table)
    >>> preprocessor.features_
    ['column 0', 'column 0 is missing', 'column 1']
    >>> preprocessor.transform(np.array([[9.0, "green"], [2.0, "blue"]], dtype=object)).round(2).tolist()
    [[1.33..., 0.0, 0.0], [0.0, 0.0, 1.0]]
    """

    def __init__(self, max_levels: int = 256, min_count: int = 4) -> None:
        for name, number in (("max_levels", max_levels), ("min_count", min_count)):
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 1:
                raise ValueError(f"{name} is {number!r}; expected a whole number of at least 1.")
        self.max_levels, self.min_count = int(max_levels), int(min_count)

    def fit(self, table: Any, name: str = "X") -> TablePreprocessor:
        """Learn from the training rows of a table.

        Args:
            table: NumPy array, pandas or polars frame, or Arrow table.
            name: What an error calls it.

        Raises:
            ValueError: If the table is empty, sparse, has a column name twice, or a column that mixes kinds or has
                infinite values.
            TypeError: If it holds something that is no number, text, boolean, date or duration.
        """
        names, columns, _ = read_columns(table, name)
        return self.fit_columns(names, columns)

    def fit_columns(self, names: list[str] | None, columns: Sequence[Column]) -> TablePreprocessor:
        """Learn from columns that were read already."""
        self.names_, self.num_columns_ = names, len(columns)
        self.notes_: list[str] = []
        self._plans = [self._plan(column, self._where(i)) for i, column in enumerate(columns)]
        self._describe()
        return self

    def _where(self, index: int) -> str:
        return f"column {index}" if self.names_ is None else _quoted(self.names_[index])

    def _describe(self) -> None:
        names = [f"column {i}" if self.names_ is None else self.names_[i] for i in range(self.num_columns_)]
        pairs = list(zip(names, self._plans, strict=True))
        numbers = [f"{n}, {part.part}" if p.kind == "time" else n for n, p in pairs for part in p.numbers]
        codes = [f"{n} is missing" if p.levels is None else n for n, p in pairs if p.cardinalities]
        self.num_numeric_ = len(numbers)
        self.cardinalities_ = [number for plan in self._plans for number in plan.cardinalities]
        if not numbers and not codes:  # nothing to learn from: the density of y alone
            self.num_numeric_, numbers = 1, ["nothing"]
        self.features_ = numbers + codes

    def _plan(self, column: Column, where: str) -> _Plan:
        missing = column.missing()
        plan = _Plan(column.kind, column.categorical)
        if missing.all():
            self.notes_.append(f"{where} has no values and is not used.")
            return _Plan("missing")
        if column.categorical:
            self._plan_levels(plan, column, missing, where)
            return plan
        for part in TIME_PARTS if column.kind == "time" else ("value",):
            values = PARTS[part](column.values[~missing])
            low, high = float(values.min()), float(values.max())
            if low == high:
                continue
            quartiles = np.quantile(values, [0.25, 0.5, 0.75])
            # In halves, so that a range of 2e308 does not overflow.
            spread = 2 * (quartiles[2] / 2 - quartiles[0] / 2) or 2 * (high / 2 - low / 2)
            scale = min(max(float(spread), 1e-300), 1e300)
            plan.numbers.append(_Number(part, float(quartiles[1]), scale, low, high))
        plan.indicator = bool(missing.any())
        if not plan.numbers and not plan.indicator:
            self.notes_.append(f"{where} has the same value in every row and is not used.")
        return plan

    def _plan_levels(self, plan: _Plan, column: Column, missing: np.ndarray, where: str) -> None:
        labels, counts = np.unique(column.values[~missing].astype(str), return_counts=True)
        order = np.lexsort((labels, -counts))  # the most frequent first, ties by the alphabet
        kept = [str(labels[i]) for i in order[: self.max_levels] if counts[i] >= self.min_count]
        others = len(labels) - len(kept)
        if not missing.any() and len(kept) + bool(others) < 2:
            reason = (
                "the same value in every row"
                if len(labels) == 1
                else f"only labels of fewer than {self.min_count} rows"
            )
            self.notes_.append(f"{where} has {reason} and is not used.")
            return
        plan.levels, plan.missing_level = kept, bool(missing.any())

    def transform(self, table: Any, name: str = "X") -> np.ndarray:
        """The matrix of a table, shape (N, F), float32, finite.

        Columns are found by name where both tables have names, in any order.

        Raises:
            ValueError: If columns are missing or there are others than in training, one holds another kind of values,
                or the table is no table; see :meth:`fit`.
            TypeError: As in `fit`.
        """
        names, columns, rows = read_columns(table, name)
        return self.transform_columns(names, columns, rows, name)

    def transform_columns(
        self, names: list[str] | None, columns: Sequence[Column], rows: int, name: str = "X"
    ) -> np.ndarray:
        """The same for columns that were read already."""
        if self.names_ is not None and names is not None:
            columns = [columns[i] for i in self._order(names, name)]
        elif len(columns) != self.num_columns_:
            raise ValueError(
                f"{name} has {len(columns)} columns, but the table in training had {self.num_columns_}; pass the same "
                "columns."
            )
        numbers: list[np.ndarray] = []
        codes: list[np.ndarray] = []
        for index, (plan, column) in enumerate(zip(self._plans, columns, strict=True)):
            if plan.kind == "missing":
                continue
            self._check_kind(plan, column, self._where(index), name)
            if plan.levels is not None:
                codes.append(_codes(plan, column))
                continue
            values = column.values
            if column.kind == "boolean":
                values = np.array([np.nan if v is None else float(v == "True") for v in values])
            if not plan.categorical:
                numbers += [_scaled(number, values) for number in plan.numbers]
            if plan.indicator:
                codes.append(np.isnan(values).astype(np.float64))
        if not numbers and not codes:
            numbers = [np.zeros(rows)]
        return np.stack(numbers + codes, 1).astype(np.float32)

    def _order(self, names: list[str], name: str) -> list[int]:
        assert self.names_ is not None
        place = {column: i for i, column in enumerate(names)}
        missing = [column for column in self.names_ if column not in place]
        extra = [column for column in names if column not in set(self.names_)]
        problems = []
        if missing:
            problems.append(f"lacks {_some(missing)}")
        if extra:
            problems.append(f"has {_some(extra)}, which the table in training had not")
        if problems:
            raise ValueError(f"{name} {' and '.join(problems)}; pass the columns of the training.")
        return [place[column] for column in self.names_]

    def _check_kind(self, plan: _Plan, column: Column, where: str, name: str) -> None:
        if column.kind in ("missing", plan.kind):
            return
        # 0 and 1 may come as booleans or as numbers, and labels that look like numbers as text.
        fine = {("number", "boolean"), ("boolean", "number")}
        if plan.categorical:
            fine |= {("number", "text")}
        if (plan.kind, column.kind) not in fine:
            raise ValueError(
                f"{where} of {name} holds {KINDS[column.kind]}, but held {KINDS[plan.kind]} in training; expected the "
                "same kind of values. Convert the column as you did for the training."
            )

    # State -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What was learned, as lists, dicts and numbers; see :meth:`from_state`."""
        return {
            "max_levels": self.max_levels, "min_count": self.min_count, "names": self.names_, "notes": self.notes_,
            "plans": [asdict(plan) for plan in self._plans],
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TablePreprocessor:
        """The fitted preprocessor that had this state."""
        self = cls(state["max_levels"], state["min_count"])
        self.names_, self.notes_ = state["names"], list(state["notes"])
        self._plans = [
            _Plan(**{**plan, "numbers": [_Number(**number) for number in plan["numbers"]]}) for plan in state["plans"]
        ]
        self.num_columns_ = len(self._plans)
        self._describe()
        return self


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    what = "the column" if len(names) == 1 else f"{len(names)} columns:"
    return f"{what} {shown}" + (", ..." if len(names) > 5 else "")


def _scaled(number: _Number, values: np.ndarray) -> np.ndarray:
    part = np.clip(PARTS[number.part](values), number.low, number.high)
    # In halves, so that the difference of -1e308 and 1e308 does not overflow; the encoder takes float32.
    scaled = np.clip((part / 2 - number.centre / 2) / number.scale * 2, -1e30, 1e30)
    return np.where(np.isnan(scaled), 0.0, scaled)


def _codes(plan: _Plan, column: Column) -> np.ndarray:
    assert plan.levels is not None
    codes = {label: float(code) for code, label in enumerate(plan.levels, 1)}
    codes_of_missing = float(len(plan.levels) + 1) if plan.missing_level else 0.0
    labels = _labels(column)
    if plan.kind == "boolean" and column.kind == "number":
        labels = np.array([{"0": "False", "1": "True"}.get(label, label) for label in labels], object)
    if plan.kind == "number" and column.kind == "boolean":
        labels = np.array([{"False": "0", "True": "1"}.get(label, label) for label in labels], object)
    found = (codes_of_missing if label is None else codes.get(label, 0.0) for label in labels)
    return np.fromiter(found, np.float64, len(labels))


# ---------------------------------------------------------------------------------------------- targets


def read_targets(y: Any, name: str, rows: int, of: str = "X") -> np.ndarray:
    """Targets as float64, shape (N, D), finite.

    Args:
        y: Targets, shape (N,) or (N, D).
        name: What an error calls them.
        rows: How many there should be.
        of: What there should be one target for each row of.

    Raises:
        ValueError: If they are missing, no numbers, not finite, or not as many.
        TypeError: If they are sparse.
    """
    if y is None:
        raise ValueError(
            f"EnergyRegressor requires y to be passed, but the target y is None: {name} is missing. Pass the targets."
        )
    if hasattr(y, "toarray") and hasattr(y, "nnz"):
        raise TypeError(f"{name} is a sparse matrix; expected dense targets. Convert it by {name}.toarray().")
    if hasattr(y, "detach"):
        y = y.detach().cpu().numpy()
    try:
        values = np.asarray(y)
    except ValueError as error:
        raise ValueError(f"{name} is no array of numbers: {error}.") from None
    if values.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} has dtype {values.dtype}; expected real numbers.")
    if values.dtype.kind in "OUS":
        values = _numbers_of(values, name)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name} has dtype {values.dtype}; expected numbers. Convert dates to numbers first.")
    values = values.astype(np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"{name} has shape {np.shape(y)}; expected (n,), or (n, D) for several outputs.")
    if len(values) != rows:
        raise ValueError(
            f"{name} has {len(values)} rows, but {of} has {rows}; expected one target for each row of {of}."
        )
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"{name} has NaN or infinity in {int(bad.any(1).sum())} of {rows} rows, the first in row {row}, column "
            f"{column}: {values[row, column]}; expected finite numbers. Drop these rows."
        )
    return values


def _numbers_of(values: np.ndarray, name: str) -> np.ndarray:
    flat = values.reshape(-1)
    result = np.empty(len(flat))
    for index, value in enumerate(flat):
        missing = value is None or type(value).__name__ in ("NAType", "NaTType")
        if not missing and isinstance(value, (str, bytes)) and len(value) and not _looks_like_a_number(value):
            raise ValueError(
                f"{name} holds text, the first in row {index}: {str(value)!r}; expected numbers. Convert it."
            )
        try:
            result[index] = np.nan if missing else float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{name} holds a {type(value).__name__} in row {index}: {value!r}; expected numbers."
            ) from None
    return result.reshape(values.shape)


def _looks_like_a_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True

"""From the columns of a table to the one matrix of numbers that an encoder takes, learned on training rows only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

import numpy as np

from energyreg.checks import check_count, check_type
from energyreg.errors import DataError
from energyreg.tables.cells import CellWarning, Reading, Tally
from energyreg.tables.columns import KINDS, Column, labels_of, read_columns

__all__ = ["TablePreprocessor"]

MICROSECONDS_PER_DAY = 86_400e6
EPOCH_WEEKDAY = 3
"""1970-01-01 was a Thursday, day 3 from Monday on."""


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
EXPECTED = {"number": "a number", "time": "a date, as 2024-05-31 or 2024-05-31 14:00"}
TIME_PARTS = ("days", "day of the year", "weekday", "hour")


@dataclass
class _Number:
    """A column of numbers that goes to the encoder: (part - centre) / scale, clipped to the range of training."""

    part: str
    centre: float
    scale: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.part not in PARTS or not self.scale > 0 or not self.low < self.high:
            raise ValueError(f"a column of numbers is described by {self}")


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
        reading: How cells of text are read, where a column of numbers or dates has some.
    """

    kind: str
    categorical: bool = False
    numbers: list[_Number] = field(default_factory=list)
    indicator: bool = False
    levels: list[str] | None = None
    missing_level: bool = False
    reading: Reading | None = None

    def __post_init__(self) -> None:
        parts = {"time": TIME_PARTS, "number": ("value",), "duration": ("value",)}.get(self.kind, ())
        numeric = bool(parts) and not self.categorical and self.levels is None
        known = self.kind in KINDS or self.kind == "missing"
        if (
            not known
            or ((self.numbers or self.indicator) and not numeric)
            or any(n.part not in parts for n in self.numbers)
        ):
            raise ValueError(f"a column is described by {self!r:.200}")

    @property
    def cardinalities(self) -> list[int]:
        """Codes of each column of categories that it gives."""
        if self.levels is not None:
            return [1 + len(self.levels) + self.missing_level]
        return [2] if self.indicator else []


class _State(TypedDict):
    """What a file holds of a preprocessor."""

    max_levels: int
    min_count: int
    names: list[str] | None
    notes: list[str]
    plans: list[_Plan]


class TablePreprocessor:
    """Turns a table into one matrix: numbers first, then categories as codes, float32.

    Numbers (integers, floats, decimals, durations) keep their order and are clipped to the range seen in training, so
    that a wild value counts as the largest one there was. A missing number takes the median, and a code of its own says
    so. Text that holds numbers or dates, but for some odd cells, counts as such (see :mod:`energyreg.tables.cells`).
    Other text, booleans and columns of a categorical dtype become codes, the most frequent first; labels that are rarer
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
        sources_: Which column of the table each of them comes from; None where there was nothing to learn from.
        notes_: What was dropped, and why, and which cells count as missing, one sentence each.
        dropped_: Those of the notes that are about columns which are not used.

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
        check_count("max_levels", max_levels)
        check_count("min_count", min_count)
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
        readings: dict[int, Reading] = {}
        for index, column in enumerate(columns):
            if column.kind == "text":
                tally = Tally()
                tally.add(column.values)
                readings[index] = tally.reading()
        columns = [readings[i].column(column) if i in readings else column for i, column in enumerate(columns)]
        return self.fit_columns(names, columns, readings)

    def fit_columns(
        self,
        names: list[str] | None,
        columns: Sequence[Column],
        readings: Mapping[int, Reading] | None = None,
        notes: Sequence[str] = (),
    ) -> TablePreprocessor:
        """Learn from columns that were read already.

        Args:
            names: Names of the columns, or None.
            columns: The columns.
            readings: Number of a column → how its cells of text were read.
            notes: What is to be known of them.
        """
        self.names_, self.num_columns_ = names, len(columns)
        self.dropped_: list[str] = []
        self._plans = [self._plan(column, f"column {self._name(i)!r}") for i, column in enumerate(columns)]
        self.notes_ = [*notes, *self.dropped_]
        for index, reading in (readings or {}).items():
            if reading.kind != "text" and reading.kind == self._plans[index].kind:
                self._plans[index].reading = reading
        self._describe()
        return self

    def _name(self, index: int) -> int | str:
        return index if self.names_ is None else self.names_[index]

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
        of_numbers = [i for i, plan in enumerate(self._plans) for _ in plan.numbers]
        of_codes = [i for i, plan in enumerate(self._plans) if plan.cardinalities]
        self.sources_: list[int | None] = [*of_numbers, *of_codes] or [None]

    def _plan(self, column: Column, where: str) -> _Plan:
        missing = column.missing()
        plan = _Plan(column.kind, column.categorical)
        if missing.all():
            self.dropped_.append(f"{where} has no values and is not used.")
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
            self.dropped_.append(f"{where} has the same value in every row and is not used.")
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
            self.dropped_.append(f"{where} has {reason} and is not used.")
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
            raise DataError(
                "{name} has {found} columns, but the table in training had {expected}; pass the same columns.",
                name=name, found=len(columns), expected=self.num_columns_,
            )  # fmt: skip
        numbers: list[np.ndarray] = []
        codes: list[np.ndarray] = []
        for index, (plan, column) in enumerate(zip(self._plans, columns, strict=True)):
            if plan.kind == "missing":
                continue
            column = self._read_text(plan, column, self._name(index), name)
            self._check_kind(plan, column, self._name(index), name)
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
            text = "{name} {problems}; pass the columns of the training."
            raise DataError(text, name=name, problems=" and ".join(problems))
        return [place[column] for column in self.names_]

    def _read_text(self, plan: _Plan, column: Column, of: int | str, name: str) -> Column:
        """Text in a column that held numbers or dates in training, as such."""
        if column.kind != "text" or plan.categorical or plan.kind not in ("number", "time"):
            return column
        values, bad = (plan.reading or Reading(plan.kind)).read(column.values)
        if not bad:
            blank = [value is None or not value.strip() for value in column.values]
            known = ~np.isnan(values) | blank
            if not known.all():
                row = int((~known).argmax())
                text = (
                    "column {column!r} of {name} has {value!r} in row {row}, taken as missing as in training; {count} "
                    "such value(s)."
                )
                fields: dict[str, Any] = {"value": column.values[row], "count": int((~known).sum())}
                error = DataError(text, name=name, column=of, rows=[row], **fields)
                warnings.warn(CellWarning(error), stacklevel=2)
            return Column(plan.kind, values)
        text = "column {column!r} has {value!r} in row {row}; expected {expected}."
        if np.isnan(values).all():
            text = "column {column!r} of {name} holds text, but held {kind} in training: " + text
        raise DataError(
            text, name=name, column=of, kind=KINDS[plan.kind], rows=bad[:1], value=str(column.values[bad[0]]),
            expected=EXPECTED[plan.kind],
        )  # fmt: skip

    def typed(self, frame: Any) -> Any:
        """A pandas frame whose columns of text are numbers and dates where they were such in training.

        Raises:
            ValueError: If a cell is neither.
        """
        names, columns, _ = read_columns(frame, "X")
        known = dict(zip(self.names_ or [], self._plans, strict=False))
        changed: dict[str, np.ndarray] = {}
        for name, column in zip(names or [], columns, strict=True):
            if column.kind == "text" and name in known:
                read = self._read_text(known[name], column, name, "X")
                if read is not column:
                    times = read.kind == "time"
                    changed[name] = as_times(read.values) if times else read.values
        return frame.assign(**changed)

    def _check_kind(self, plan: _Plan, column: Column, of: int | str, name: str) -> None:
        if column.kind in ("missing", plan.kind):
            return
        # 0 and 1 may come as booleans or as numbers, and labels that look like numbers as text.
        fine = {("number", "boolean"), ("boolean", "number")}
        if plan.categorical:
            fine |= {("number", "text")}
        if (plan.kind, column.kind) not in fine:
            raise DataError(
                "column {column!r} of {name} holds {found}, but held {expected} in training; expected the same kind of "
                "values. Convert the column as you did for the training.",
                name=name, column=of, found=KINDS[column.kind], expected=KINDS[plan.kind],
            )  # fmt: skip

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
        check_type("preprocessor", state, _State)
        self = cls(state["max_levels"], state["min_count"])
        self.names_, self.notes_, self.dropped_ = state["names"], list(state["notes"]), []
        self._plans = [
            _Plan(
                **{
                    **plan,
                    "numbers": [_Number(**number) for number in plan["numbers"]],
                    "reading": _reading_from(plan.get("reading")),
                }
            )
            for plan in state["plans"]
        ]
        self.num_columns_ = len(self._plans)
        if self.names_ is not None and (len(self.names_), len(set(self.names_))) != (self.num_columns_,) * 2:
            raise ValueError(f"preprocessor has {len(self.names_)} names of {self.num_columns_} columns")
        self._describe()
        return self


def _reading_from(state: dict[str, Any] | None) -> Reading | None:
    return None if state is None else Reading(**{**state, "words": tuple(state["words"])})


def as_times(microseconds: np.ndarray) -> np.ndarray:
    """Microseconds since 1970 as datetime64, NaN as not a time."""
    known = ~np.isnan(microseconds)
    times = np.full(len(microseconds), np.datetime64("NaT"), "datetime64[us]")
    times[known] = microseconds[known].astype(np.int64).astype("datetime64[us]")
    return times


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
    labels = labels_of(column)
    if plan.kind == "boolean" and column.kind == "number":
        labels = np.array([{"0": "False", "1": "True"}.get(label, label) for label in labels], object)
    if plan.kind == "number" and column.kind == "boolean":
        labels = np.array([{"False": "0", "True": "1"}.get(label, label) for label in labels], object)
    found = (codes_of_missing if label is None else codes.get(label, 0.0) for label in labels)
    return np.fromiter(found, np.float64, len(labels))

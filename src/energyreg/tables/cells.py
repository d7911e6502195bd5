"""Cells of text: which columns hold numbers or dates, and what their odd cells say.

A column of text is read as a whole. Where nearly all of its cells are numbers (or dates), the others count as missing,
and a warning names them; so a single '?' does not turn a column of numbers into labels.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from energyreg.errors import DataError
from energyreg.tables.columns import Column

__all__ = ["CellWarning", "ColumnWarning", "Reading", "Tally"]

MOST_BAD = 0.05
"""Part of the cells of a column of numbers or dates that may be none; one cell may in any case, from ten on."""
MOST_WORDS = 1_000
"""Different cells of a column that are remembered."""
MARKERS = frozenset(
    [
        "", "?", "??", "-", "--", "---", "/", "\u2013", "\u2014", ".", "..", "...", "*", "n.a.", "n. a.", "n.a", "n/a",
        "na", "nan", "-nan", "nat", "<na>", "none", "null", "(null)", "nil", "#n/a", "#n/a n/a", "#na", "#n/v",
        "#value!", "#div/0!", "#ref!", "#num!", "#name?", "#null!", "n.d.", "n/d", "nd", "n.v.", "n/v", "k.a.", "k/a",
        "n/k", "nk", "tbd", "tba", "missing", "unknown", "undefined", "not available", "no data",
    ]
)  # fmt: skip
"""What stands for a missing value in columns of numbers and dates, in lower case."""

_SIGNS = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-") | dict.fromkeys("\u2019\u2018\u02bc", "'")
)
"""Minus signs, and apostrophes between groups of digits, as people and programs write them."""
_EXPONENT = r"(?:[eEdD](?P<exponent>[+-]?\d+))?"
_UNIT = r"(?P<before>[$€£¥] ?)?(?P<sign>[+-]?)(?P<before2>[$€£¥] ?)?{}(?P<after> ?[%‰$€£¥])?"
_NUMBERS = {
    "point": re.compile(
        _UNIT.format(
            r"(?P<whole>[1-9]\d{0,2}(?P<group>[, '_])\d{3}(?:(?P=group)\d{3})*|\d*)(?:\.(?P<fraction>\d*))?" + _EXPONENT
        )
    ),
    "comma": re.compile(
        _UNIT.format(
            r"(?P<whole>[1-9]\d{0,2}(?P<group>[. '_])\d{3}(?:(?P=group)\d{3})*|\d*)(?:,(?P<fraction>\d*))?" + _EXPONENT
        )
    ),
}
_PLAIN = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_INTEGER = re.compile(r"[+-]?\d+")
_CLOCK = (
    r"(?:(?:T|t| +)(?P<hour>\d{1,2})(?::(?P<minute>\d\d))?(?::(?P<second>\d\d)(?:[.,](?P<fraction>\d{1,9}))?)?"
    r" ?(?P<half>[AaPp]\.?[Mm]\.?)?)? ?(?:[Zz]|UTC|GMT|[+-]\d\d(?::?\d\d)?)?"
)
_DATES = (
    re.compile(r"(?P<year>\d{4})([-/.])(?P<first>\d{1,2})\2(?P<second_>\d{1,2})" + _CLOCK),
    re.compile(r"(?P<second_>\d{1,2})\.(?P<first>\d{1,2})\.(?P<year>\d{4})" + _CLOCK),
)
_SLASHED = re.compile(r"(?P<first>\d{1,2})([/-])(?P<second_>\d{1,2})\2(?P<year>\d{4})" + _CLOCK)
TIMES = ("iso", "day", "month")
NOUNS = {"number": ("a number", "numbers"), "time": ("a date", "dates")}


class CellWarning(UserWarning):
    """Cells of a column that are not what they look like.

    Attributes:
        error: The same as an error that knows where the cells are, to be said in the words of a file.
    """

    def __init__(self, error: DataError, text: object = None) -> None:
        super().__init__(str(error if text is None else text))
        self.error = error


class ColumnWarning(UserWarning):
    """Columns that are not used, with the reasons."""

    def __init__(self, notes: Sequence[str]) -> None:
        more = f" And {len(notes) - 5} more columns." if len(notes) > 5 else ""
        super().__init__(" ".join(note[:1].upper() + note[1:] for note in notes[:5]) + more)


def _tidy(text: str) -> str:
    text = text.strip()
    return text if text.isascii() else unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS).strip()


def number(text: str, convention: str = "point") -> tuple[float, str] | None:
    """The number that a cell says, and its unit (a percent or currency sign, or none); None where it says none.

    Args:
        text: The cell: 1234.5, 1,234.5, 1 234.5, 1.2D+03, also with other signs of minus.
        convention: The decimal mark: "point" or "comma".
    """
    text = _tidy(text)
    found = _NUMBERS[convention].fullmatch(text)
    if found is None:
        bare = text.lower().lstrip("+-")
        return (float(text), "") if bare in ("inf", "infinity") and len(text) - len(bare) <= 1 else None
    whole, fraction = found["whole"] or "", found["fraction"] or ""
    if not whole and not fraction:
        return None
    units = [unit.strip() for unit in (found["before"], found["before2"], found["after"]) if unit]
    if len(units) > 1:
        return None
    digits = re.sub(r"\D", "", whole)
    value = float(f"{found['sign']}{digits or 0}.{fraction or 0}e{found['exponent'] or 0}")
    return value, units[0] if units else ""


def time(text: str, convention: str = "iso") -> float | None:
    """The local time that a cell says, in microseconds since 1970; None where it says none. An offset is not applied.

    Args:
        text: The cell: 2024-05-31, 2024-05-31 14:00+02:00, 31.12.2023; with slashes by the convention.
        convention: What comes first before a slash: "day", "month", or "iso" where that is unknown.
    """
    text = _tidy(text)
    found = next(filter(None, (pattern.fullmatch(text) for pattern in _DATES)), None)
    month, day = "first", "second_"
    if found is None and convention != "iso":
        found = _SLASHED.fullmatch(text)
        month, day = ("first", "second_") if convention == "month" else ("second_", "first")
    if found is None:
        return None
    hour = int(found["hour"] or 0)
    if found["half"]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * (found["half"][0] in "Pp")
    minute, second = int(found["minute"] or 0), int(found["second"] or 0)
    if hour > 24 or minute > 59 or second > 60 or (hour == 24 and (minute or second)):
        return None
    try:
        date = np.datetime64(f"{int(found['year']):04d}-{int(found[month]):02d}-{int(found[day]):02d}", "D")
    except ValueError:
        return None
    clock = 3600 * hour + 60 * minute + second
    return float(date.astype(np.int64)) * 86_400e6 + clock * 1e6 + int((found["fraction"] or "").ljust(6, "0")[:6])


def is_marker(text: str) -> bool:
    """Whether a cell says that there is no value."""
    return " ".join(text.lower().split()) in MARKERS


@dataclass(frozen=True)
class Reading:
    """How the cells of a column of text are read.

    Args:
        kind: "number", "time", or "text" where they are labels.
        convention: The decimal mark of numbers, or the order of dates with slashes.
        unit: The sign that all numbers have.
        words: Cells that say nothing: they count as missing.
    """

    kind: str = "text"
    convention: str = ""
    unit: str = ""
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = {"text": ("",), "number": ("", "point", "comma"), "time": ("", *TIMES)}
        if self.convention not in known.get(self.kind, ()):
            raise ValueError(f"cells of text are read as {self.kind!r:.40} by {self.convention!r:.40}")

    def value(self, text: str) -> float | None:
        """What a cell says; None where it says nothing of this kind."""
        if self.kind == "time":
            return time(text, self.convention or "iso")
        found = number(text, self.convention or "point")
        return found[0] if found is not None and found[1] == self.unit else None

    def read(self, labels: np.ndarray, *, known: Collection[str] | None = None) -> tuple[np.ndarray, list[int]]:
        """Values of labels, NaN where they are missing, and the rows of those that are neither values nor missing.

        Args:
            labels: Text, or None where it is missing, shape (N,).
            known: Cells that count as missing; by default those of the reading.
        """
        words = set(self.words if known is None else known)
        values: dict[str | None, float] = {None: np.nan}
        bad: set[str] = set()
        for label in set(labels.tolist()) - {None}:
            value = self.value(label)
            values[label] = np.nan if value is None else value
            if value is None and label not in words and not is_marker(label):
                bad.add(label)
        rows = [row for row, label in enumerate(labels) if label in bad] if bad else []
        return np.fromiter((values[label] for label in labels), np.float64, len(labels)), rows

    def column(self, column: Column) -> Column:
        """A column of text as it is read; any other as it is."""
        if self.kind == "text" or column.kind != "text" or column.values.dtype != object:
            return column
        return Column(self.kind, self.read(column.values)[0])


@dataclass
class _Cell:
    """A cell that is no plain number and no ISO date: its first row, and how often it comes."""

    row: int
    count: int = 0


@dataclass
class Tally:
    """Counts of what the cells of a column of text may be, block by block."""

    known: int = 0
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    integers: int = 0
    codes: bool = False
    markers: int = 0
    odd: dict[str, dict[str, _Cell]] = field(default_factory=lambda: {"number": {}, "time": {}})

    def add(self, labels: Iterable[str | None], start: int = 0) -> None:
        """Count a block of cells, the first of which is in row `start`; None is missing."""
        cells: dict[str, _Cell] = {}
        for row, label in enumerate(labels, start):
            if label is not None:
                cells.setdefault(label, _Cell(row)).count += 1
        for label, cell in cells.items():
            self._count(label, cell)

    def add_values(self, kind: str, count: int, *, whole: bool = False) -> None:
        """Count values that are no text, of kind "number" or "time"."""
        self.known += count
        self.integers += count if whole else 0
        for key in ("point", "comma") if kind == "number" else TIMES:
            self.counts[kind, key, ""] += count

    def _count(self, label: str, cell: _Cell) -> None:
        count, plain = cell.count, dict.fromkeys(self.odd, False)
        if is_marker(label):
            self.markers += count
        else:
            self.known += count
            text = label.strip()
            for convention in ("point", "comma"):
                found = number(text, convention)
                if found is not None:
                    self.counts["number", convention, found[1]] += count
            for convention in TIMES:
                if time(text, convention) is not None:
                    self.counts["time", convention, ""] += count
            plain["number"] = bool(_PLAIN.fullmatch(text))
            plain["time"] = text[4:5] == "-" and time(text) is not None
            if _INTEGER.fullmatch(text):
                self.integers += count
                self.codes |= len(text.lstrip("+-")) > 1 and text.lstrip("+-").startswith("0")
        for kind, odd in self.odd.items() if label.strip() else ():  # blank cells are nothing odd
            if not plain[kind] and (label in odd or len(odd) < MOST_WORDS):
                odd.setdefault(label, _Cell(cell.row)).count += count

    def reading(self) -> Reading:
        """How the column is to be read."""
        if not self.counts:
            return Reading()
        counts = dict(self.counts)
        if counts.get(("time", "day", "")) == counts.get(("time", "month", "")):  # nobody can tell them apart
            counts = {key: count for key, count in counts.items() if key[1] not in ("day", "month")}
        if not counts:
            return Reading()
        # Of equal counts the point rather than the comma, and no order of days and months without need.
        key, count = max(counts.items(), key=lambda item: (item[1], item[0][1] in ("point", "iso"), item[0]))
        bad = self.known - count
        if bad > MOST_BAD * self.known and not (bad == 1 and count >= 9):
            return Reading()
        whole = key[0] == "number" and self.integers == self.known - bad
        if key[0] == "number" and (self.codes or (whole and not bad and not self.markers)):
            return Reading()  # text that holds whole numbers alone, or codes such as 007, is meant as text
        found = Reading(*key)
        return Reading(*key, tuple(label for label in self.odd[key[0]] if found.value(label) is None))

    def warning(self, reading: Reading, name: str, column: int | str) -> CellWarning | None:
        """What is to be said of the column's cells; None where all are plain."""
        odd = self.odd.get(reading.kind)
        if not odd:
            return None
        words = set(reading.words)
        one, many = NOUNS[reading.kind]
        parts: list[str] = []
        rows: list[int] = []
        values: list[str] = []
        for bad in (True, False):
            labels = [label for label in odd if (label in words) == bad]
            if not labels:
                continue
            count = sum(odd[label].count for label in labels)
            shown = []
            for label in labels[:3]:
                value = reading.value(label)
                said = f" as {value:.9g}" if reading.kind == "number" and value is not None else ""
                shown.append(f"{{values[{len(values)}]!r}} in row {{rows[{len(rows)}]}}{said}")
                rows.append(odd[label].row)
                values.append(label)
            more = f", and {count - len(shown)} more" if count > len(shown) else ""
            verb, what = ("is", one) if count == 1 else ("are", many)
            said = f"{verb} not {what} and taken as missing" if bad else f"{verb} read as {what}"
            parts.append(f"{count} value{'s' * (count > 1)} {said} ({', '.join(shown)}{more})")
        text = f"column {{column!r}} of {{name}}: {'; '.join(parts)}."
        return CellWarning(DataError(text, name=name, column=column, rows=rows, values=values))

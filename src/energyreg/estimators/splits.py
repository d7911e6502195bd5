"""Which rows are held out: at random, the latest, or whole groups, so that no row is judged by its own neighbours."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from energyreg.errors import DataError
from energyreg.tables.columns import read_columns

__all__ = ["Order", "SplitWarning", "notice_order", "order_of"]


class SplitWarning(UserWarning):
    """Rows are held out at random though they are in an order."""


@dataclass(frozen=True)
class Order:
    """How the rows of a table, R of them, hang together.

    Attributes:
        time: What the latest rows are told by, shape (R,), NaN for the earliest; None where time does not count.
        groups: Number of the group of each row, shape (R,); None where there are none.
    """

    time: np.ndarray | None = None
    groups: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> Self:
        """The same of some rows."""
        time, groups = (None if part is None else part[rows] for part in (self.time, self.groups))
        return type(self)(time, groups)

    def split(
        self, rows: int, held_out: int, conformal: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of the rows to train on, to validate on, and for conformal scores, ascending.

        Args:
            rows: How many there are.
            held_out: Rows to validate on, about.
            conformal: Rows for conformal scores, about.
            rng: Draws the order of rows or groups.

        Raises:
            ValueError: If there are too few groups.
        """
        if self.time is not None:
            order = np.argsort(np.where(np.isnan(self.time), -np.inf, self.time), kind="stable")
            ends = [self._whole_moment(order, rows - count) for count in (held_out + conformal, conformal)]
            train, validation, scored = np.split(order, ends)
            return np.sort(train), np.sort(validation), np.sort(scored)
        order = rng.permutation(rows)
        ends = [held_out, held_out + conformal]
        if self.groups is not None:
            order, ends = self._whole_groups(order, ends)
        validation, scored, train = np.split(order, ends)
        return np.sort(train), np.sort(validation), np.sort(scored)

    def _whole_moment(self, order: np.ndarray, end: int) -> int:
        """The end of a part, moved so that rows of one time stay together where others are before them."""
        assert self.time is not None
        if end >= len(order):
            return end
        same = int((self.time[order] == self.time[order[end]]).argmax())
        return same if same >= 2 else end

    def _whole_groups(self, order: np.ndarray, ends: list[int]) -> tuple[np.ndarray, list[int]]:
        """Rows group by group, in a random order of the groups, and ends of the parts between groups."""
        assert self.groups is not None
        names, first = np.unique(self.groups[order], return_index=True)
        rank = np.empty(int(names.max()) + 1, int)
        rank[names[np.argsort(first)]] = np.arange(len(names))
        order = order[np.argsort(rank[self.groups[order]], kind="stable")]
        counts = np.cumsum(np.bincount(rank[self.groups]))
        parts = 1 + (ends[0] > 0) + (ends[1] > ends[0])
        if len(names) < parts:
            raise DataError(
                "groups has {found} different value(s); expected at least {expected}, as no group is in two parts of "
                "the rows. Pass other groups, or none.",
                name="groups", found=len(names), expected=parts,
            )  # fmt: skip
        number = np.searchsorted(counts, ends, side="left") + 1  # groups up to each end
        number[0] = min(number[0], len(names) - (parts - 1)) if ends[0] else 0
        number[1] = min(max(number[1], number[0] + 1), len(names) - 1) if ends[1] > ends[0] else number[0]
        return order, [int(counts[count - 1]) if count else 0 for count in number]


def order_of(
    split: str,
    rows: int,
    times: Mapping[int | str, np.ndarray],
    groups: Any = None,
    time: Any = None,
) -> Order:
    """How rows hang together, by what the user says of them.

    Args:
        split: "auto", "random" or "time".
        rows: How many there are.
        times: Columns of dates and a dated index, by name.
        groups: Group of each row, shape (R,), labels or numbers; a missing one is a group of its own.
        time: Time of each row, shape (R,), dates or numbers.

    Raises:
        ValueError: If both are given, one does not fit, or it is open which dates count.
    """
    if time is None and split == "time":
        if len(times) > 1:
            names = ", ".join(repr(name) for name in times)
            raise ValueError(
                f"split is 'time', but there are several columns of dates: {names}. Pass time=, one of them."
            )
        time = next(iter(times.values()), np.arange(rows))
    if groups is not None and time is not None:
        raise ValueError("groups and a split by time are both given; expected one of them.")
    if groups is not None:
        return Order(groups=_codes(_column(groups, "groups", rows)))
    if time is None:
        return Order()
    column = _column(time, "time", rows)
    if column.dtype == object:
        raise ValueError("time holds text; expected dates or numbers, one for each row.")
    return Order(time=column)


def _column(values: Any, name: str, rows: int) -> np.ndarray:
    """One value a row: numbers as float64, text as objects."""
    from energyreg.tables.cells import Tally

    if hasattr(values, "to_frame"):
        table = values.to_frame()
    else:
        values = np.asarray(values)
        table = values[:, None] if values.ndim == 1 else values
    _, columns, count = read_columns(table, name)
    if len(columns) != 1 or count != rows:
        shape = (count, len(columns))
        raise ValueError(f"{name} has shape {shape}; expected one value for each of the {rows} rows.")
    column = columns[0]
    if name == "time" and column.kind == "text":
        tally = Tally()
        tally.add(column.values)
        column = tally.reading().column(column)
    return column.values


def _codes(labels: np.ndarray) -> np.ndarray:
    missing = np.array([label is None for label in labels]) if labels.dtype == object else np.isnan(labels)
    codes = np.empty(len(labels), int)
    known, codes[~missing] = np.unique(labels[~missing].astype(str), return_inverse=True)
    codes[missing] = len(known) + np.arange(missing.sum())
    return codes


def notice_order(times: Mapping[int | str, np.ndarray]) -> None:
    """Warn where rows that are held out at random are in the order of a date."""
    for name, values in times.items():
        steps = np.diff(values[~np.isnan(values)])
        moved = np.count_nonzero(steps)
        if moved >= 2 and len(steps) >= 0.9 * len(values) - 1 and ((steps >= 0).all() or (steps <= 0).all()):
            warnings.warn(
                f"The rows are in the order of {name if name == 'the index' else f'column {name!r}'}, but the rows to "
                "validate on are drawn at random, so that scores and intervals say how well gaps are filled, not the "
                "future. Pass split='time' to hold out the latest rows (--time-column), or split='random' where that "
                "is meant; rows of one person or place are kept together by groups= (--group-column).",
                SplitWarning,
                stacklevel=5,
            )
            return

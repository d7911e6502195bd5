"""What a loader of images returns: files or arrays, with their targets, units, groups and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["ArrayTask", "CountTask", "ImageTask", "Task", "atoms"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What all tasks share; N rows, D targets."""

    targets: NDArray[np.float64]
    names: tuple[str, ...]
    units: tuple[str, ...]
    source: str
    licence: str
    groups: NDArray[np.str_] | None = None
    time: NDArray[np.int64] | None = None
    split: NDArray[np.str_] | None = None
    skipped: tuple[str, ...] = ()

    # The fields with one entry a row; a child adds its own.
    _PER_ROW: ClassVar[tuple[str, ...]] = ("targets", "groups", "time", "split")

    def __post_init__(self) -> None:
        # Loaders of this package obey this by construction; a task that a user puts together may not.
        n = len(self)
        for name in self._PER_ROW:
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"{name} has {len(value)} rows; expected {n}, one for each input.")
        if self.targets.ndim != 2 or self.targets.shape[1] != len(self.names) or len(self.units) != len(self.names):
            raise ValueError(
                f"targets has shape {self.targets.shape}, for names {self.names} and units {self.units}; expected "
                f"(N, D), with a name and a unit for each of the D columns."
            )

    def __len__(self) -> int:
        return len(getattr(self, self._PER_ROW[0]))

    def subset(self, rows: NDArray[Any] | Sequence[int]) -> Self:
        """The task with these rows only, in this order.

        Args:
            rows: Row numbers, shape (n,), or a mask of bools, shape (N,).
        """
        chosen = np.asarray(rows)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise ValueError(f"rows is a mask of shape {chosen.shape}; expected ({len(self)},).")
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64)
        changes: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in self._PER_ROW and value is not None:
                changes[field.name] = [value[row] for row in chosen] if isinstance(value, list) else value[chosen]
        return replace(self, **changes)

    def rows(self, part: str) -> NDArray[np.int64]:
        """Row numbers of a part of the split that the data set comes with, ascending.

        Raises:
            ValueError: There is no split, or no such part.
        """
        if self.split is None:
            raise ValueError("this task comes with no split; use energyreg.datasets.split_by_group or split_by_blocks.")
        found = np.flatnonzero(self.split == part)
        if len(found) == 0:
            raise ValueError(f"part is {part!r}; expected one of {sorted(set(self.split.tolist()))}.")
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageTask(Task):
    """Image files and their targets. Images stay on disk, as paths.

    Attributes:
        files: The N images.
        targets: float64, shape (N, D).
        names: Names of the D targets.
        units: Units of the D targets.
        source: Where the data come from, and whom to cite.
        licence: What the source says about use.
        groups: What must stay on one side of a split (a person, a recording, a slide), shape (N,), or None where the
            files do not say.
        time: Order of the frames inside a group, shape (N,), or None if there is none.
        split: The part that each row belongs to, shape (N,), where the data come with a split; otherwise None.
        skipped: Files that were left out on request, or by a documented rule, each with the reason.
    """

    files: list[Path]

    _PER_ROW: ClassVar[tuple[str, ...]] = ("files", *Task._PER_ROW)


@dataclass(frozen=True, eq=False, kw_only=True)
class CountTask(ImageTask):
    """Images with a dot on each thing that is counted.

    Attributes:
        dots: For each image the pixels of its dots as (row, column), int64, shape (n, 2). targets is their number.
    """

    dots: list[NDArray[np.int64]]

    _PER_ROW: ClassVar[tuple[str, ...]] = (*ImageTask._PER_ROW, "dots")


@dataclass(frozen=True, eq=False, kw_only=True)
class ArrayTask(Task):
    """Inputs that are in one file, as an array; otherwise as :class:`ImageTask`.

    Attributes:
        x: Images as uint8, shape (N, C, H, W) in RGB, or features, shape (N, ...).
    """

    x: NDArray[Any]

    _PER_ROW: ClassVar[tuple[str, ...]] = ("x", *Task._PER_ROW)


def atoms(values: NDArray[np.floating[Any]], share: float = 0.01) -> dict[float, float]:
    """Values that many rows have exactly, where a density would have to be infinite.

    Steering by a game pad is full of them (0 and ±1). Give such values their own probability, or spread them over a
    cell (dequantise) before you compare likelihoods.

    Args:
        values: One target, shape (N,) or (N, 1).
        share: Least fraction of the rows that makes a point mass, in (0, 1].

    Returns:
        Value → share of the rows, ascending by value.

    Raises:
        ValueError: There is more than one column, or none of the rows.

    Example:
        >>> import numpy as np
        >>> atoms(np.array([-1.0, 0.0, 0.0, 0.3, 1.0]), share=0.4)
        {0.0: 0.4}
    """
    column = np.asarray(values)
    if column.size == 0 or column.size != len(column):
        raise ValueError(f"values has shape {column.shape}; expected one target, (N,) or (N, 1), with N > 0.")
    distinct, count = np.unique(column, return_counts=True)
    shares = count / column.size
    # A value seen once is no point mass, however few rows there are.
    often = (shares >= share) & (count > 1)
    return dict(zip(distinct[often].tolist(), shares[often].tolist(), strict=True))

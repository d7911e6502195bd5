"""Angles of head poses: one order of columns, one sign, and the unit that the caller asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from energyreg.datasets.tasks import Task

__all__ = ["POSE", "AngleUnit", "converted", "pose_fields", "without_wide_angles"]

T = TypeVar("T", bound=Task)

AngleUnit = Literal["radians", "degrees"]
POSE = ("yaw", "pitch", "roll")
"""Columns of every head pose that this package loads, whatever the order in the file."""


def converted(angles: NDArray[np.float64], have: AngleUnit, units: AngleUnit) -> NDArray[np.float64]:
    """Angles in the unit asked for.

    Raises:
        ValueError: units is neither "radians" nor "degrees".
    """
    if units not in ("radians", "degrees"):
        raise ValueError(f"units is {units!r}; expected 'radians' or 'degrees'.")
    if have == units:
        return angles
    return np.radians(angles) if units == "radians" else np.degrees(angles)


def pose_fields(poses: NDArray[np.float64], have: AngleUnit, units: AngleUnit) -> dict[str, Any]:
    """The fields targets, names and units of a task of poses (yaw, pitch, roll), shape (N, 3)."""
    return {"targets": converted(poses, have, units), "names": POSE, "units": (units,) * 3}


def without_wide_angles(task: T, degrees: NDArray[np.float64], limit: float | None, name: Callable[[int], str]) -> T:
    """The task without the rows that have an angle beyond ±limit degrees, which `skipped` lists; all rows for None.

    Args:
        task: A task of N rows.
        degrees: The angles, shape (N, D).
        limit: The largest angle that stays, in degrees.
        name: What `skipped` calls a row, by its number.

    Raises:
        ValueError: limit is not positive.
    """
    if limit is None:
        return task
    if not limit > 0:
        raise ValueError(f"limit is {limit}; expected a positive angle in degrees, or None to keep every row.")
    keep = np.abs(degrees).max(axis=1) <= limit
    skipped = tuple(f"{name(row)}: an angle beyond ±{limit}°" for row in np.flatnonzero(~keep).tolist())
    return replace(task.subset(keep), skipped=skipped)

"""Angles of head poses: one order of columns, one sign, and the unit that the caller asks for."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["POSE", "AngleUnit", "converted", "within_limit"]

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


def within_limit(degrees: NDArray[np.float64], limit: float | None) -> NDArray[np.bool_]:
    """Which rows have all their angles in [-limit, limit] degrees, shape (N,); all of them for None.

    Raises:
        ValueError: limit is not positive.
    """
    if limit is None:
        return np.ones(len(degrees), dtype=bool)
    if not limit > 0:
        raise ValueError(f"limit is {limit}; expected a positive angle in degrees, or None to keep every row.")
    return np.abs(degrees).max(axis=1) <= limit

"""Targets of any kind, as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from energyreg.errors import DataError, DataTypeError
from energyreg.tables.columns import tensor_to_array

__all__ = ["read_targets"]


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
        raise DataError(
            "EnergyRegressor requires y to be passed, but the target y is None: {name} is missing. Pass the targets.",
            name=name,
        )
    if hasattr(y, "toarray") and hasattr(y, "nnz"):
        text = "{name} is a sparse matrix; expected dense targets. Convert it by {name}.toarray()."
        raise DataTypeError(text, name=name)
    if hasattr(y, "detach") and hasattr(y, "layout"):
        y = tensor_to_array(y, name)
    if np.ma.is_masked(y):
        row = np.argwhere(np.ma.getmaskarray(y))[0][0]
        text = "{name} is masked in {found} of {count} rows, the first in row {row}; expected numbers. Drop these rows."
        found = int(np.ma.getmaskarray(y).reshape(len(y), -1).any(1).sum())
        raise DataError(text, name=name, found=found, count=len(y), rows=[row])
    try:
        values = np.asarray(y)
    except ValueError as error:
        raise DataError("{name} is no array of numbers: {reason}.", name=name, reason=error) from None
    if values.dtype.kind == "c":
        text = "Complex data not supported: {name} has dtype {dtype}; expected real numbers."
        raise DataError(text, name=name, dtype=values.dtype)
    if values.dtype.kind in "OUS":
        values = _numbers_of(values, name)
    if values.dtype.kind not in "biuf":
        text = "{name} has dtype {dtype}; expected numbers. Convert dates to numbers first."
        raise DataError(text, name=name, dtype=values.dtype)
    values = values.astype(np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] == 0:
        text = "{name} has shape {shape}; expected (n,), or (n, D) for several outputs."
        raise DataError(text, name=name, shape=np.shape(y))
    if len(values) != rows:
        text = "{name} has {found} rows, but {of} has {expected}; expected one target for each row of {of}."
        raise DataError(text, name=name, found=len(values), of=of, expected=rows)
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            "{name} has NaN or infinity in {found} of {count} rows, the first in row {row}, column {column!r}: "
            "{value}; expected finite numbers. Drop these rows.",
            name=name, found=int(bad.any(1).sum()), count=rows, rows=[row], column=column, value=values[row, column],
        )  # fmt: skip
    return values


def _numbers_of(values: np.ndarray, name: str) -> np.ndarray:
    flat, width = values.reshape(-1), max(values.size // max(len(values), 1), 1) if values.ndim else 1
    result = np.empty(len(flat))
    for index, value in enumerate(flat):
        missing = value is None or type(value).__name__ in ("NAType", "NaTType")
        if not missing and isinstance(value, (str, bytes)) and len(value) and not _looks_like_a_number(value):
            text = "{name} holds text, the first in row {row}: {value!r}; expected numbers. Convert it."
            raise DataError(text, name=name, rows=[index // width], value=str(value))
        try:
            result[index] = np.nan if missing else float(value)
        except (TypeError, ValueError, OverflowError):
            text = "{name} holds a {kind} in row {row}: {value!r}; expected numbers."
            raise DataError(text, name=name, kind=type(value).__name__, rows=[index // width], value=value) from None
    return result.reshape(values.shape)


def _looks_like_a_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True

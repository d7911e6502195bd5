"""Precision of targets: float64 arithmetic on values in the range of float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["LARGEST", "MARGIN", "SMALLEST", "ExactModule", "as_numbers", "exact_dtype", "float32_inside", "to_exact"]

# Every value that a space accepts or returns is in the range of float32, so that no cast of a sample to float32 gives
# 0, an infinity, or a subnormal that a device may flush to 0.
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)

# Least fraction of an interval between its ends and a point whose logit is taken: 16 times the spacing of float32
# below 1, so that the logit of data given in float32 means something, and |logit| <= 13.8.
MARGIN = 1e-6

DEVICES_WITHOUT_FLOAT64 = {"mps"}


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it."""
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64


def to_exact(y: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device and cast it to the device's exact dtype."""
    dtype = exact_dtype(device)
    # The cast happens on the side that has float64.
    return y.to(device).to(dtype) if dtype == torch.float64 else y.to(dtype).to(device)


class ExactModule(nn.Module):
    """A module whose tensors keep their precision: they follow it to a device, but not into another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # nn.Module sends every move and cast of its tensors through here. Ours follow the moves and ignore the casts.
        def move(tensor: Tensor) -> Tensor:
            device = fn(torch.empty(0, device=tensor.device)).device
            dtype = exact_dtype(device) if tensor.is_floating_point() else tensor.dtype
            if dtype == torch.float32:  # fn would move it as float64, which such a device refuses
                tensor = to_exact(tensor, device)
            moved = fn(tensor)
            if moved.dtype == dtype:
                return moved
            # A cast has lost digits: move the original, unless it has no values (to_empty).
            return moved.to(dtype) if tensor.is_meta else tensor.to(device).to(dtype)

        return super()._apply(move, recurse)


def float32_inside(first: float, last: float) -> tuple[float, float]:
    """The first and the last float32 number in [first, last]; unchanged where that would cost part of the interval."""
    least, most = np.float32(first), np.float32(last)
    if float(least) < first:
        least = np.nextafter(least, np.float32(np.inf))
    if float(most) > last:
        most = np.nextafter(most, np.float32(-np.inf))
    loss = max(float(least) - first, last - float(most))
    return (float(least), float(most)) if loss <= MARGIN * (last - first) else (first, last)


def as_number(value: Any, name: str) -> float:
    """Read an argument as a float.

    Raises:
        ValueError: It is no number, or outside the range of float32.
    """
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise ValueError(f"{name} has the value {value!r}; expected a finite number of at most {LARGEST:.2g} in size.")
    return number


def as_numbers(value: Any, name: str) -> float | list[float]:
    """Read an argument as one float, or as one for each dimension, under the rules of :func:`as_number`."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [as_number(entry, name) for entry in value]
    return as_number(value, name)


def mean_and_spread(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of the population) of each column, (N, D) to (D,) both.

    Relative to the first row: a constant column has a spread of exactly 0, and a far origin costs no digits.
    """
    mean = (t - t[0]).mean(0)
    return t[0] + mean, (t - t[0]).std(0, correction=0)


def first_row(bad: Tensor) -> tuple[str, int, int]:
    """How many rows of a bool tensor (N, D) have a True, in words, and the row and column of the first."""
    row, column = bad.nonzero()[0].tolist()
    return f"{int(bad.any(-1).sum())} of {len(bad)} rows", row, column

"""Dimensions that are angles: which they are, and their values in [-π, π)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["periodic_flags", "wrap_angles"]


def wrap_angles(z: Tensor, angle: Tensor) -> Tensor:
    """Bring the dimensions that are angles, by a mask of shape (D,), into [-π, π), (*S, D) to (*S, D)."""
    return torch.where(angle, torch.remainder(z + math.pi, 2 * math.pi) - math.pi, z)


def periodic_flags(dim: int, periodic: Sequence[bool] | None) -> tuple[bool, ...]:
    """Whether each dimension is an angle, as plain booleans; none of them for None.

    Raises:
        ValueError: If dim < 1, or periodic has another length than dim.
    """
    if dim < 1:
        raise ValueError(f"dim is {dim}; expected at least 1.")
    flags = (False,) * dim if periodic is None else tuple(bool(flag) for flag in periodic)
    if len(flags) != dim:
        raise ValueError(f"periodic has {len(flags)} entries, but dim is {dim}; pass one flag per dimension.")
    return flags

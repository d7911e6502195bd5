"""Where target spaces end: in user units, and in model space, where all that lies beyond is one target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from energyreg.densities.precision import LARGEST, MARGIN, SMALLEST
from energyreg.densities.spaces import Circle, Interval, Positive, Product, TargetSpace

__all__ = ["bounds", "margins", "snap", "spacing", "unit", "window"]


RESOLUTION = 1e-5
"""Fraction of an interval's width within which a quantile is taken for its end: a density smooths the targets that
stand at an end, in the logit, over about as much."""


def _parts(space: TargetSpace) -> list[TargetSpace]:
    return space.parts if isinstance(space, Product) else [space]


def bounds(space: TargetSpace) -> Tensor:
    """First and last value of each dimension in user units, infinite where there is none, shape (2, D), float64."""
    ends: list[tuple[float, float]] = []
    for part in _parts(space):
        if isinstance(part, Interval):
            ends += part.ends
        elif isinstance(part, Circle):
            ends += [(part.low, part.low + part.period)] * part.dim
        else:
            ends += [(0.0 if isinstance(part, Positive) else -math.inf, math.inf)] * part.dim
    return torch.tensor(ends, dtype=torch.double, device=space.loc.device).T


def margins(space: TargetSpace, fraction: float = MARGIN) -> Tensor:
    """The values that far from the ends of an interval, shape (2, D); the bounds of other spaces.

    Args:
        space: Target space.
        fraction: Of the width; by default that up to which each value has a logit of its own.
    """
    ends = bounds(space)
    width = fraction * (ends[1] - ends[0])
    bounded = torch.tensor([isinstance(part, Interval) for part in _parts(space) for _ in range(part.dim)])
    inner = torch.stack([ends[0] + width, ends[1] - width])
    return torch.where(bounded.to(ends.device), inner, ends)


def snap(space: TargetSpace, y: Tensor) -> Tensor:
    """Take values within the resolution of an end of an interval for that end, (*S, D) to (*S, D), float64."""
    (low, high), (first, last) = bounds(space), margins(space, RESOLUTION)
    y = y.double()
    return torch.where((y <= first) & (low < first), low, torch.where((y >= last) & (last < high), high, y))


def window(space: TargetSpace) -> Tensor:
    """The first and the last model value that stand for a target of their own, shape (2, D), float64.

    An interval's logit is cut a millionth of the width from its ends; up to them the map goes on as a straight line,
    which is one unit of the logit.
    """
    columns = []
    for part in _parts(space):
        if isinstance(part, Circle):
            columns.append(part.loc.new_tensor([[-math.pi], [math.pi]]).expand(-1, part.dim))
            continue
        if isinstance(part, Positive):
            columns.append(part.to_model(part.loc.new_tensor([[SMALLEST], [LARGEST]]).expand(2, part.dim)))
            continue
        first, last = -LARGEST, LARGEST
        if isinstance(part, Interval):
            last = math.log(1 / MARGIN - 1) + 1
            first = -last
        columns.append((part.loc.new_tensor([[first], [last]]) - part.loc) / part.scale)
    return torch.cat(columns, 1)


def unit(space: TargetSpace) -> Tensor:
    """How much the targets vary: the width of an interval, a turn of a circle, else about a deviation, shape (D,)."""
    low, high = bounds(space)
    here = space.to_user(torch.zeros_like(space.loc))
    spread = (space.to_user(torch.ones_like(space.loc)) - here).abs()
    return torch.where((high - low).isfinite(), high - low, spread)


def spacing(space: TargetSpace, dtype: torch.dtype) -> Tensor:
    """Distance of the numbers of a dtype where the targets are, shape (D,)."""
    low, high = bounds(space)
    here = space.to_user(torch.zeros_like(space.loc)).abs()
    return torch.finfo(dtype).eps * torch.where((high - low).isfinite(), torch.maximum(low.abs(), high.abs()), here)

"""Refinement: gradient ascent on a function of y with backtracking, as papers I to III predict; many tops to modes.

:func:`refine` climbs. The functions below it decide which of many tops are modes of their own: along a line of nodes
(:func:`separate_peaks`), or among points in any number of dimensions (:func:`nearby` and :func:`merge`). Users meet
them as :meth:`energyreg.models.predictive.PredictiveDistribution.modes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from energyreg.densities.angles import wrap_angles
from energyreg.inference.energy import AnyEnergy, periodic_of

__all__ = ["refine"]


def refine(
    function: AnyEnergy,
    start: Tensor,
    *,
    num_steps: int = 10,
    step_size: float | Sequence[float] | Tensor = 0.1,
    decay: float = 0.5,
    periodic: Sequence[bool] | None = None,
) -> Tensor:
    """Climb a function from initial estimates; it never falls.

    A step is kept if the function does not fall; otherwise the point stays and its step is shortened, each point by
    itself. A point where the function is NaN stays.

    Args:
        function: Maps y of shape (*S, B, D) to values (*S, B), each a function of its own y alone.
        start: Initial estimates, shape (*S, B, D).
        num_steps: Steps T.
        step_size: Length λ that multiplies the gradient: a number, one per dimension (D,), or one per point and
            dimension, any shape that broadcasts to (*S, B, D) and ends in D.
        decay: Factor that shortens a rejected step, in (0, 1).
        periodic: Which dimensions are angles, wrapped into [-π, π), where the function does not say it; see
            :func:`~energyreg.inference.energy.periodic_of`.

    Returns:
        Refined estimates, shape (*S, B, D).

    Raises:
        ValueError: If num_steps < 0, step_size ≤ 0 or of another length than D, decay is not in (0, 1), or periodic has
            another length than D.

    Source:
        Gustafsson et al., ECCV 2020 (prediction by gradient ascent, with the step rule of its code).

    >>> refine(lambda y: -(y - 1).square().sum(-1), torch.zeros(1, 2), num_steps=50).round(decimals=3)
    tensor([[1., 1.]])
    """
    return refine_with_values(
        function, start, num_steps=num_steps, step_size=step_size, decay=decay, periodic=periodic
    )[0]


def refine_with_values(
    function: AnyEnergy,
    start: Tensor,
    *,
    num_steps: int = 10,
    step_size: float | Sequence[float] | Tensor = 0.1,
    decay: float = 0.5,
    periodic: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`refine`, with the function's values at the refined estimates, (*S, B), which are known on the way."""
    if num_steps < 0:
        raise ValueError(f"num_steps is {num_steps}; expected a whole number ≥ 0.")
    if not torch.as_tensor(step_size).gt(0).all():
        raise ValueError(f"step_size is {step_size}; expected numbers > 0.")
    if not 0 < decay < 1:
        raise ValueError(f"decay is {decay}; expected a number in (0, 1).")
    y = start.detach()
    step = _as_step(step_size, y)
    wrap = _wrapper(y, periodic_of(function, y.shape[-1], periodic))

    def value_and_gradient(y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            value = function(y)
            (gradient,) = torch.autograd.grad(value.sum(), y)
        return value.detach(), gradient

    y = wrap(y)
    value, gradient = value_and_gradient(y)
    for number in range(1, num_steps + 1):
        trial = wrap(y + step * gradient)
        if number == num_steps:  # nobody asks where it would go on to
            with torch.no_grad():
                trial_value, trial_gradient = function(trial), gradient
        else:
            trial_value, trial_gradient = value_and_gradient(trial)
        better = (trial_value >= value)[..., None]  # False for NaN: such a step is rejected too
        y = torch.where(better, trial, y)
        gradient = torch.where(better, trial_gradient, gradient)
        value = torch.where(better[..., 0], trial_value, value)
        step = torch.where(better, step, step * decay)
    return y, value


def _as_step(step_size: float | Sequence[float] | Tensor, y: Tensor) -> Tensor:
    step = torch.as_tensor(step_size, dtype=y.dtype, device=y.device)
    dim = y.shape[-1]
    if step.ndim and step.shape[-1] != dim:
        raise ValueError(f"step_size has length {step.shape[-1]}; expected one number, or {dim}, one per dimension.")
    try:
        return step.expand_as(y)
    except RuntimeError:
        raise ValueError(
            f"step_size has shape {tuple(step.shape)}, which does not broadcast to the points' {tuple(y.shape)}."
        ) from None


def _wrapper(y: Tensor, periodic: Sequence[bool]) -> Callable[[Tensor], Tensor]:
    """The function that brings angles into [-π, π) and leaves other dimensions alone."""
    if not any(periodic):
        return lambda y: y
    angle = torch.tensor(periodic, device=y.device)
    return lambda y: wrap_angles(y, angle)


def displacement(start: Tensor, stop: Tensor, periodic: Sequence[bool]) -> Tensor:
    """The shortest way from one point to another, (*S, D); angles go the shorter way round."""
    return _wrapper(stop - start, periodic)(stop - start)


def separate_peaks(
    density: Tensor,
    position: Tensor,
    masses: Tensor,
    *,
    tolerance: float,
    min_prominence: float,
    min_probability: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split nodes along a line at the valleys between the peaks that count.

    A peak does not count if a higher neighbour (the left one of equals) stands within the tolerance, or behind a valley
    that is at most min_prominence lower than the peak; nor, unless it is the highest of all, if the nodes between its
    valleys hold less than min_probability, smallest first. Its nodes fall to its neighbours.

    Args:
        density: Log-density at the nodes, in nats, up to a constant per row, shape (G, B). NaN is the lowest of all.
        position: Ascending coordinates of the nodes, shape (G, B); on a circle unwrapped, and less than a turn long.
        masses: Probabilities of the nodes, shape (G, B).
        tolerance: Distance of positions.
        min_prominence: In nats.
        min_probability: Between 0 and 1.

    Returns:
        Nodes at the peaks, shape (K, B), at the valleys between them, shape (K - 1, B), and the number of peaks of each
        row, shape (B,); entries beyond are to be ignored.
    """
    d, x, m = density.T.double().nan_to_num(-math.inf), position.T.double(), masses.T.double()
    wall = torch.full_like(d[:, :1], -math.inf)
    left_of, right_of = (lambda t, w: torch.cat([w, t[:, :-1]], 1)), (lambda t, w: torch.cat([t[:, 1:], w], 1))
    # On a plateau this marks its first node, also on the way up; the latter has no valley beyond it and goes.
    is_peak = (d > left_of(d, wall)) & (d >= right_of(d, wall))
    is_peak[:, 0] |= ~is_peak.any(1)
    level = m.cumsum(1) - m / 2  # the node at the bottom of a valley belongs to both sides
    node = torch.arange(d.shape[1], device=d.device).expand_as(d)
    while True:
        # Nodes from one peak up to the next are one stretch; stretch 0 comes before the first peak.
        stretch = is_peak.cumsum(1)
        count = stretch[:, -1]
        shape = (len(d), int(count.max()) + 1)
        lowest = d.new_full(shape, math.inf).scatter_reduce(1, stretch, d, "amin")
        bottom = d == lowest.gather(1, stretch)
        edge = node.new_full(shape, d.shape[1] - 1)
        top = edge.scatter_reduce(1, stretch, node, "amin")[:, 1:]
        first = edge.scatter_reduce(1, stretch, torch.where(bottom, node, edge[:, :1]), "amin")
        last = (0 * edge).scatter_reduce(1, stretch, torch.where(bottom, node, 0), "amax")
        valley = ((first + last) // 2)[:, 1:]  # the middle of a flat bottom
        rank = torch.arange(shape[1] - 1, device=d.device)
        real, inner = rank < count[:, None], rank < count[:, None] - 1
        height = d.gather(1, top).masked_fill(~real, -math.inf)
        depth = lowest[:, 1:].masked_fill(~inner, -math.inf)
        gap = torch.where(inner, right_of(x.gather(1, top), -wall) - x.gather(1, top), math.inf)
        low_right = (height - depth <= min_prominence) | (gap < tolerance)
        low_left = (height - left_of(depth, wall) <= min_prominence) | (left_of(gap, -wall) < tolerance)
        drop = (low_right & (right_of(height, wall) > height)) | (low_left & (left_of(height, wall) >= height))
        drop &= real
        if not drop.any():
            border = torch.where(inner, level.gather(1, valley), 1.0)
            mass = (border - left_of(border, torch.zeros_like(wall))).masked_fill(~real, math.inf)
            mass.scatter_(1, height.argmax(1, keepdim=True), math.inf)
            # The least of its neighbourhood: the others may grow before their turn comes.
            drop = (mass < min_probability) & (mass < right_of(mass, -wall)) & (mass <= left_of(mass, -wall))
        if not drop.any():
            return top.T, valley[:, :-1].T, count
        row, column = drop.nonzero(as_tuple=True)
        is_peak[row, top[row, column]] = False


def nearby(points: Tensor, height: Tensor, tolerance: float, periodic: Sequence[bool]) -> Tensor:
    """For each point the highest one within the tolerance that is no part of a higher one's surroundings.

    Args:
        points: Shape (S, B, D).
        height: Their heights, descending along S, shape (S, B). Points at -inf count as part of the first.
        tolerance: Euclidean distance.
        periodic: Which dimensions are angles.

    Returns:
        Indices along S, shape (S, B); a point that stands for itself has its own.
    """
    parent = torch.where(height > -math.inf, -1, 0)
    while True:
        free = parent < 0
        if not free.any():
            return parent
        leader = free.int().argmax(0, keepdim=True)  # the first, so the highest; any for rows that are done
        centre = points.gather(0, leader[..., None].expand(-1, -1, points.shape[-1]))
        near = displacement(centre, points, periodic).square().sum(-1) <= tolerance**2
        near.scatter_(0, leader, True)  # itself, if it is NaN
        parent = torch.where(free & near, leader, parent)


def merge(points: Tensor, height: Tensor, share: Tensor, parent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each point's share to the point that it belongs to, and keep those that stand for themselves.

    Args:
        points: Shape (S, B, D).
        height: Shape (S, B).
        share: Shape (S, B).
        parent: Indices along S of points that are their own parents, shape (S, B).

    Returns:
        Points, heights and shares in the given order, (K, B, D), (K, B) and (K, B). Rows with fewer than K points are
        filled up with height -inf and share 0.
    """
    index = torch.arange(len(parent), device=parent.device)[:, None]
    own = parent == index
    total = torch.zeros_like(share).scatter_add(0, parent, share)
    count = own.sum(0)
    order = (~own).int().argsort(dim=0, stable=True)[: int(count.max())]
    points = points.gather(0, order[..., None].expand(-1, -1, points.shape[-1]))
    filled = index[: len(order)] < count
    height = torch.where(filled, height.gather(0, order), -math.inf)
    return points, height, torch.where(filled, total.gather(0, order), 0.0)

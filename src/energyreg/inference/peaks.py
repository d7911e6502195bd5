"""Which of many peaks are modes of their own: along a line of nodes, or among points in any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from energyreg.densities.angles import periodic_flags, wrap_angles

__all__ = ["displacement", "merge", "nearby", "separate_peaks"]


def displacement(start: Tensor, stop: Tensor, periodic: Sequence[bool]) -> Tensor:
    """The shortest way from one point to another, (*S, D); angles go the shorter way round."""
    way = stop - start
    flags = periodic_flags(way.shape[-1], periodic)
    return wrap_angles(way, torch.tensor(flags, device=way.device)) if any(flags) else way


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


def merge(points: Tensor, height: Tensor, weight: Tensor, parent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each point's weight to the point that it belongs to, and keep those that stand for themselves.

    Args:
        points: Shape (S, B, D).
        height: Shape (S, B).
        weight: Shape (S, B).
        parent: Indices along S of points that are their own parents, shape (S, B).

    Returns:
        Points, heights and weights in the given order, (K, B, D), (K, B) and (K, B). Rows with fewer than K points are
        filled up with height -inf and weight 0.
    """
    index = torch.arange(len(parent), device=parent.device)[:, None]
    own = parent == index
    total = torch.zeros_like(weight).scatter_add(0, parent, weight)
    count = own.sum(0)
    order = (~own).int().argsort(dim=0, stable=True)[: int(count.max())]
    points = points.gather(0, order[..., None].expand(-1, -1, points.shape[-1]))
    filled = index[: len(order)] < count
    height = torch.where(filled, height.gather(0, order), -math.inf)
    return points, height, torch.where(filled, total.gather(0, order), 0.0)

"""Regions of highest density: the threshold on the density, and the intervals where it is exceeded on a line."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from energyreg.densities import ends
from energyreg.inference.row_blocks import RowBlock

__all__ = ["intervals", "mass_above", "sorted_masses", "threshold_at_level", "threshold_below_mass"]


def threshold_at_level(block: RowBlock, density: Tensor, level: float) -> Tensor:
    """The density, up to log Z, of the node where the highest ones reach a probability, shape (B,)."""
    ordered, order = density.sort(0, descending=True)
    cumulative = block.masses.gather(0, order).cumsum(0)
    last = (cumulative < level * cumulative[-1]).sum(0, keepdim=True).clamp_max(len(density) - 1)
    return ordered.gather(0, last)[0]


def sorted_masses(block: RowBlock, density: Tensor) -> tuple[Tensor, Tensor]:
    """Densities of the nodes in descending order, and the probability of all nodes up to each, (M, B) both."""
    ordered, order = density.sort(0, descending=True)
    cumulative = block.masses.double().gather(0, order).cumsum(0)
    return ordered, cumulative / cumulative[-1]


def mass_above(block: RowBlock, y: Tensor) -> Tensor:
    """Probability of the nodes where the density is at least that of y, shape (B,)."""
    density = block.point_density()
    _, cumulative = sorted_masses(block, density)
    count = (density >= block.log_density(y)).sum(0, keepdim=True)
    mass = cumulative.gather(0, (count - 1).clamp_min(0))
    return torch.where(count > 0, mass, torch.zeros_like(mass))[0]


def threshold_below_mass(block: RowBlock, density: Tensor, mass: Tensor) -> Tensor:
    """The density, up to log Z, above which lies every y whose mass above is at most `mass` (B,), shape (B,)."""
    ordered, cumulative = sorted_masses(block, density)
    count = (cumulative <= mass).sum(0, keepdim=True)
    value = ordered.gather(0, count.clamp_max(len(ordered) - 1))
    return torch.where(count < len(ordered), value, torch.full_like(value, -torch.inf))[0]


def intervals(block: RowBlock, density: Tensor, threshold: Tensor) -> list[Tensor]:
    """The runs of cells at or above the threshold as intervals in user units, one tensor (k, 2) per row.

    A threshold of -inf gives the whole space, beyond all cells.
    """
    everything = threshold == -torch.inf
    inside = (density >= threshold).T  # (B, G)
    rows, count = inside.shape
    circle = block.space.periodic[0]
    padding = torch.zeros(rows, 1, dtype=torch.bool, device=inside.device)
    starts = inside & ~torch.cat([inside[:, -1:] if circle else padding, inside[:, :-1]], 1)
    stops = inside & ~torch.cat([inside[:, 1:], inside[:, :1] if circle else padding], 1)
    whole = inside.all(1)  # a circle all inside has no border; it is cut where the model is
    starts[:, 0] |= whole
    stops[:, -1] |= whole
    unit, height = block.cells.row_centres.T, (density - threshold).T.double()

    def crossing(cells: Tensor, step: int) -> Tensor:
        """Where the density, linear from a border cell to its neighbour outside, meets the threshold."""
        row, cell = cells.nonzero(as_tuple=True)
        neighbour = cell + step
        outer = (neighbour < 0) | (neighbour >= count)
        wrapped = neighbour % count
        here, there = height[row, cell], height[row, wrapped]
        fraction = (here / (here - there).clamp_min(1e-12)).clamp(0, 1)
        position = unit[row, wrapped] + torch.where(outer, float(step), 0.0)  # beyond the cut of a circle
        edge = torch.full_like(position, 0.0 if step < 0 else 1.0)
        position = position if circle else torch.where(outer, edge, position)
        fraction = fraction if circle else torch.where(outer, torch.ones_like(fraction), fraction)
        return torch.lerp(unit[row, cell], position, fraction)

    lower, upper = crossing(starts, -1), crossing(stops, 1)
    counts = starts.sum(1)
    row = torch.repeat_interleave(torch.arange(rows, device=upper.device), counts)
    if circle:
        # A run over the cut starts last and stops first in its row.
        first = counts.cumsum(0) - counts
        wraps = upper[first] < lower[first]
        order = torch.arange(len(upper), device=upper.device)
        shifted = torch.where(order + 1 < (first + counts)[row], order + 1, first[row])
        upper = torch.where(wraps[row], upper[shifted] + (shifted == first[row]), upper)
        z = [_circle_angle(block.f.reference_of(row), bound, block.dtype) for bound in (lower, upper)]
        start = block.space.to_user(((z[0] + math.pi).remainder(2 * math.pi) - math.pi)[:, None])[:, 0]
        stop = start + (z[1] - z[0]) * block.space.scale
    else:
        reference = block.f.reference_of(row)
        z = [reference.from_unit(bound[:, None].to(block.dtype)) for bound in (lower, upper)]
        start, stop = (block.space.to_user(end)[:, 0] for end in z)
        if block.has_margins:
            # A margin is in the region as a whole, or not at all.
            low, high = (block.margin_density >= threshold)[:, row]
            (bottom, top), (first, last) = ends.bounds(block.space)[:, 0], ends.margins(block.space)[:, 0]
            start = torch.where((start <= first) & low, bottom, start.clamp(first, last))
            stop = torch.where((stop >= last) & high, top, stop.clamp(first, last))
    # A cell just at the threshold gives an interval of no length.
    solid = stop > start
    counts = counts.clone().index_add_(0, starts.nonzero()[:, 0], -(~solid).to(counts.dtype))
    found = torch.stack([start, stop], -1)[solid].to(block.dtype).split(counts.tolist())
    whole_space = ends.bounds(block.space).T.to(block.dtype)
    return [whole_space if all_of_it else pieces for pieces, all_of_it in zip(found, everything.tolist(), strict=True)]


def _circle_angle(reference: Any, u: Tensor, dtype: torch.dtype) -> Tensor:
    """Angles of unit coordinates on the circle that may lie a turn beyond (0, 1)."""
    turn = u.floor()
    z = reference.from_unit((u - turn)[:, None].to(dtype))[:, 0]
    return z.double() + 2 * math.pi * turn

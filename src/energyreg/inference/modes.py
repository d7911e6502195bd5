"""Modes of densities: gradient ascent from estimates, the highest point, and all modes with their probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from energyreg.inference.ascent import refine
from energyreg.inference.peaks import displacement, merge, nearby, separate_peaks
from energyreg.inference.row_blocks import RowBlock

__all__ = ["Modes", "ascend", "find_modes", "highest", "refine_in_user_units"]


@dataclass(frozen=True)
class Modes:
    """The modes of a predictive distribution, per row, the most probable first.

    Attributes:
        values: Where they are, in user units, a list of B tensors (k, D); each row has at least one.
        log_prob: Their log-density in nats and user units, a list of B tensors (k,).
        probabilities: Probability of each mode's basin of attraction, a list of B tensors (k,); they sum to 1.
    """

    values: list[Tensor]
    log_prob: list[Tensor]
    probabilities: list[Tensor]

    @property
    def counts(self) -> Tensor:
        """How many modes each row has, shape (B,)."""
        return torch.tensor([len(row) for row in self.values])


def refine_in_user_units(
    block: RowBlock, start: Tensor, step_size: Tensor | None, num_steps: int, decay: float
) -> Tensor:
    """Estimates (S, B, D) in user units, refined by gradient ascent; see `PredictiveDistribution.refine`."""
    step = block.spread() / 2 if step_size is None else step_size
    z = ascend(block, block.space.to_model(start).to(block.dtype), step, num_steps, decay)
    found = block.space.to_user(z).to(start.dtype)
    size = block.points_at_once(len(start), 16 * block.dim)
    # The way to model space and back rounds; a gain that is lost on it is none.
    kept = [
        torch.where((block.log_density(b) >= block.log_density(a))[..., None], b, a)
        for a, b in zip(start.split(size), found.split(size), strict=True)
    ]
    return torch.cat(kept)


def highest(block: RowBlock) -> Tensor:
    """The highest mode in user units, shape (B, D)."""
    best = block.point_density().argmax(0, keepdim=True)
    if block.is_line:
        return block.space.to_user(block.cells.from_unit(_zoom(block, best))[0, :, None])
    found = ascend(block, _points_at(block, best), block.spread() / 2, num_steps=50)
    return block.space.to_user(found[0])


def find_modes(
    block: RowBlock, seed: int, num_starts: int, num_steps: int, **thresholds: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Values in user units, log-densities and probabilities of each row's modes; see `PredictiveDistribution.modes`."""
    if block.is_line:
        z, mass, kept = _line_modes(block, **thresholds)
    else:
        z, mass, kept = _point_modes(block, seed, num_starts, num_steps, **thresholds)
    order = torch.where(kept, mass, -1.0).argsort(dim=0, descending=True, stable=True)
    y = block.space.to_user(z.gather(0, order[..., None].expand_as(z))).to(block.dtype)
    height, mass, kept = block.log_prob(y).T, mass.gather(0, order).T, kept.gather(0, order).T
    counts = kept.sum(1).tolist()
    return (
        y.transpose(0, 1)[kept].split(counts),
        height[kept].split(counts),
        mass[kept].to(block.dtype).split(counts),
    )


def _line_modes(
    block: RowBlock, tolerance: float, min_prominence: float, min_probability: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Modes of D = 1 from the cells: model values (K, B, 1), probabilities (K, B), and which entries are modes."""
    density, masses = block.point_density(), block.masses
    z = block.nodes.y[..., 0].expand_as(density)
    cell = torch.arange(len(density), device=density.device)[:, None].expand_as(density)
    circle = block.space.periodic[0]
    if circle:
        # Cut where the density is lowest: that point belongs to no mode's top, so that the rest is a line.
        cell = (cell + density.argmin(0)) % len(density)
        density, masses, z = (table.gather(0, cell) for table in (density, masses, z))
        z = z + 2 * math.pi * (z < z[:1])
    top, valley, count = separate_peaks(
        density, z, masses,
        tolerance=tolerance, min_prominence=min_prominence, min_probability=min_probability,
    )  # fmt: skip
    z = block.cells.from_unit(_zoom(block, cell.gather(0, top)))
    border = _zoom(block, cell.gather(0, torch.cat([torch.zeros_like(top[:1]), valley])), lowest=True)
    level = block.cells.unit_cdf(border.remainder(1) if circle else border)
    level = (level - level[0]).remainder(1) if circle else level
    rank = torch.arange(len(top), device=top.device)[:, None]
    kept = rank < count
    level = torch.where(rank == 0, 0.0, torch.where(kept, level, 1.0))  # of each basin's lower end
    mass = torch.cat([level, torch.ones_like(level[:1])]).diff(dim=0).clamp_min(0)
    if circle:
        # The first and the last are neighbours too, over the cut.
        last = (count - 1)[None]
        ends = torch.cat([torch.zeros_like(last), last])
        a, b = z.gather(0, ends)
        both = mass.gather(0, ends).sum(0)
        height = block.user_density(torch.stack([a, b])[..., None])
        one = (count > 1) & (displacement(a[:, None], b[:, None], (True,))[:, 0].abs() < tolerance)
        lower = torch.where(height[0] < height[1], ends[0], ends[1])
        higher = ends.sum(0) - lower
        mass = torch.where(one & (rank == higher), both, mass)
        kept = kept & ~(one & (rank == lower))
    return z[..., None], mass, kept


def _point_modes(
    block: RowBlock,
    seed: int,
    num_starts: int,
    num_steps: int,
    tolerance: float,
    min_prominence: float,
    min_probability: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Modes from weighted points: model values (K, B, D), probabilities (K, B), and which entries are modes."""
    periodic, rows, spread = block.space.periodic, block.f.batch_size, block.spread()
    # One random level in each of as many equal strata of the points' cdf, the same for all rows. (Not evenly spaced
    # ones: every 32nd point of a Sobol sequence lies in the same corner.)
    jitter = torch.rand(num_starts, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    levels = ((torch.arange(num_starts) + jitter) / num_starts).to(spread.device)
    index = block.points.indices_at(levels[:, None].expand(-1, rows))
    best = block.point_density().argmax(0, keepdim=True)
    z = _points_at(block, torch.cat([best, index]))
    weight = torch.full((len(z), rows), 1 / num_starts, dtype=torch.double, device=z.device)
    weight[0] = 0.0  # the best point is no draw: it is there for the sake of the highest mode
    # Twice: what has not arrived goes on from fresh steps, now that it is few. Of another length, as one that is
    # twice the variance at a top jumps from side to side and gets nowhere.
    for step in (1 / 2, 1 / 3):
        z = ascend(block, z, step * spread, num_steps)
        z, height, weight = _by_height(block, z, weight)
        z, height, weight = merge(z, height, weight, nearby(z, height, tolerance, periodic))
    z, height, weight = merge(z, height, weight, _over_passes(block, z, height, spread, min_prominence))
    small = (weight < min_probability) & (height > -math.inf)
    small[0] = False  # the highest
    if small.any():
        distance = _distances(block, z, spread).masked_fill(small[:, None] | (height == -math.inf)[:, None], math.inf)
        own = torch.arange(len(z), device=z.device)[:, None]
        z, height, weight = merge(z, height, weight, torch.where(small, distance.argmin(0), own))
    kept = height > -math.inf
    kept[0] = True
    return z, weight, kept


def _points_at(block: RowBlock, index: Tensor) -> Tensor:
    """The points with the given indices, (S, B), in model space, shape (S, B, D)."""
    z = block.nodes.y.to(block.dtype).expand(-1, block.f.batch_size, -1)
    return z.gather(0, index[..., None].expand(-1, -1, block.dim))


def _zoom(block: RowBlock, cell: Tensor, lowest: bool = False) -> Tensor:
    """Narrow the brackets around the highest (or lowest) cells, (K, B), to unit coordinates, by grids of nine."""
    centres = block.cells.row_centres
    if block.space.periodic[0]:
        padded = torch.cat([centres[-1:] - 1, centres, centres[:1] + 1])
    else:
        # Not the very ends, which rounding in user units may put outside a window.
        first, last = (centres[:1] / 2).clamp_max(1e-6), ((1 + centres[-1:]) / 2).clamp_min(1 - 1e-6)
        padded = torch.cat([first, centres, last])
    low, high = padded.gather(0, cell), padded.gather(0, cell + 2)
    steps = torch.linspace(0, 1, 9, dtype=torch.double, device=low.device)[:, None, None]
    size = block.points_at_once(len(cell), 64)
    for _ in range(5):
        grid = torch.lerp(low, high, steps)
        z = block.cells.from_unit(grid)[..., None].split(max(size // 9, 1), 1)
        density = torch.cat([block.user_density(part) for part in z], 1)
        index = density.argmin(0, keepdim=True) if lowest else density.argmax(0, keepdim=True)
        low = grid.gather(0, (index - 1).clamp_min(0))[0]
        high, middle = grid.gather(0, (index + 1).clamp_max(8))[0], grid.gather(0, index)[0]
    return middle


def _by_height(block: RowBlock, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points, heights and weights, the highest of each row first."""
    size = block.points_at_once(len(z), 16 * block.dim)
    height = torch.cat([block.user_density(part) for part in z.split(size)]).nan_to_num(-math.inf)
    height, order = height.sort(dim=0, descending=True, stable=True)
    return z.gather(0, order[..., None].expand_as(z)), height, weight.gather(0, order)


def _distances(block: RowBlock, z: Tensor, spread: Tensor) -> Tensor:
    """Distances between points, in standard deviations, (K, B, D) to (K, K, B)."""
    return (displacement(z[:, None], z[None], block.space.periodic).square() / spread).sum(-1)


def _over_passes(block: RowBlock, z: Tensor, height: Tensor, spread: Tensor, min_prominence: float) -> Tensor:
    """For each top, by descending height, the one that it belongs to for want of a valley between them, (K, B)."""
    own = torch.arange(len(z), device=z.device)[:, None].expand_as(height)
    if len(z) == 1:
        return own
    # Only the three nearest of the higher ones: a chain of neighbours does for the rest.
    higher = own[:, None] < own[None, :]  # (i, j): i comes before j
    distance = _distances(block, z, spread).masked_fill(~higher | (height == -math.inf)[None], math.inf)
    distance, near = distance.topk(min(3, len(z)), 0, largest=False)
    target = z[:, None].expand(-1, len(z), -1, -1).gather(0, near[..., None].expand(*near.shape, block.dim))
    way = displacement(z[None], target, block.space.periodic)
    lowest = torch.full_like(distance, math.inf)
    flat = (len(near) * len(z), block.f.batch_size, block.dim)
    size = block.points_at_once(flat[0], 16 * block.dim)
    for fraction in torch.linspace(0, 1, 17, dtype=z.dtype)[1:-1].tolist():
        line = (z[None] + fraction * way).reshape(flat).split(size)
        density = torch.cat([block.user_density(part) for part in line])
        lowest = torch.minimum(lowest, density.reshape(lowest.shape).nan_to_num(-math.inf))
    barrier = torch.where(distance < math.inf, height - lowest, math.inf)
    least, which = barrier.min(0)
    parent = torch.where(least <= min_prominence, near.gather(0, which[None])[0], own)
    for _ in range(len(z).bit_length()):  # the parents' parents, down to the roots
        parent = parent.gather(0, parent)
    return parent


def ascend(block: RowBlock, z: Tensor, step_size: Any, num_steps: int, decay: float = 0.5) -> Tensor:
    """Refine by gradient ascent on the density in user units from model values, (S, B, D) to (S, B, D)."""
    # The gradient keeps about three times what a value needs.
    size = block.points_at_once(len(z), 3 * block.f.floats_per_point(False) + 16 * block.dim)
    options: dict[str, Any] = {"num_steps": num_steps, "decay": decay, "periodic": block.space.periodic}
    parts = [refine(lambda z: block.user_density(z), part, step_size=step_size, **options) for part in z.split(size)]
    return torch.cat(parts)

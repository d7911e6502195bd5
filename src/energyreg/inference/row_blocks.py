"""Blocks of rows: an energy with its nodes, and what both say in user units, within a memory budget."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from energyreg.densities import ends
from energyreg.densities.spaces import Circle, Product, TargetSpace
from energyreg.inference.cells import Cells
from energyreg.inference.energy import ReferencedEnergy
from energyreg.inference.integrators import AdaptiveQuadrature
from energyreg.inference.nodes import Nodes
from energyreg.inference.peaks import displacement
from energyreg.inference.points import WeightedPoints

__all__ = ["KEPT_FRACTION", "NodeCache", "RowBlock", "Rows", "refine_cells"]

FAR = 50.0
"""Distance from 0 in model space that no target has once the units are fitted, but for a wild one."""
Rows: TypeAlias = slice | Tensor
"""Some rows of x: a slice, or their numbers."""

KEPT_FRACTION = 1 / 4
"""Fraction of the memory budget up to which contexts, and nodes, are kept with a predictive distribution for the next
question, beside what a block works in; more is computed again."""

LEAST_MASS = 1e-12
"""Probability of a margin from which on it is known as a difference of cumulative probabilities."""


def warn_if_unfitted(space: TargetSpace, z: Tensor) -> None:
    """Warn of targets, at z in model space, that are far from 0 because nobody has fitted the units to targets."""
    if torch.compiler.is_compiling() or not isinstance(space, torch.nn.Module) or bool(space.fitted) or not z.numel():
        return
    if (farthest := float(z.detach().abs().max())) > FAR:
        warnings.warn(
            f"y is up to {farthest:.3g} from 0 in model space, where a model that was not fitted expects values of "
            "about 1. Call model.fit_preprocessing(x, y) with the training rows before training or predicting.",
            stacklevel=3,
        )


@dataclass(frozen=True)
class RowBlock:
    """A block of rows with its energy and what was computed from it.

    Args:
        rows: Which rows.
        f: Their energy.
        integrate: Makes the nodes, when they are first asked for.
        space: Target space.
        dtype: Of what is computed.
        memory_budget: Working memory in bytes.
    """

    rows: slice
    f: ReferencedEnergy
    integrate: Callable[[], Nodes]
    space: TargetSpace
    dtype: torch.dtype
    memory_budget: int

    @cached_property
    def nodes(self) -> Nodes:
        """The points and weights that stand for the density."""
        return self.integrate()

    @property
    def is_line(self) -> bool:
        """Whether the nodes are the cells of a line, with a cdf in closed form."""
        return isinstance(self.nodes, Cells)

    @property
    def cells(self) -> Cells:
        """The nodes of a line."""
        assert isinstance(self.nodes, Cells)
        return self.nodes

    @property
    def points(self) -> WeightedPoints:
        """The nodes where they are no line."""
        assert isinstance(self.nodes, WeightedPoints)
        return self.nodes

    @property
    def dim(self) -> int:
        """Target dimensions D."""
        return self.space.dim

    @property
    def masses(self) -> Tensor:
        """Probabilities of the nodes, shape (M, B)."""
        return self.nodes.masses

    @property
    def log_partition(self) -> Tensor:
        """Log Z, shape (B,); exactly 0, without any nodes, where f is the log-density of the base."""
        if self.f.normalised:
            return self.f.context.new_zeros(self.f.batch_size)
        return self.nodes.log_partition

    @cached_property
    def angle(self) -> Tensor:
        """Which dimensions are angles, shape (D,)."""
        return torch.tensor(self.space.periodic, device=self.f.context.device)

    def points_at_once(self, count: int, floats: int) -> int:
        """How many of `count` points per row fit the memory budget, with these floats besides the energy's own."""
        size = self.f.batch_size * (floats + self.f.floats_per_point(False))
        return min(max(self.memory_budget // (4 * size), 1), max(count, 1))

    # Density ---------------------------------------------------------------------------------------------------------

    def log_density(self, y: Tensor) -> Tensor:
        """Log-density in user units up to log Z, (*S, B, D) to (*S, B); -inf outside the space, NaN for NaN."""
        # Points outside stand somewhere inside in model space, so that no NaN arises, and are set to -inf at the end.
        z = self.space.to_model(y).to(self.dtype)
        warn_if_unfitted(self.space, z)
        log_density = self.f(z) + self.space.log_abs_det_jacobian(y).to(self.dtype)
        log_density = self._with_margins(log_density, y)
        log_density = torch.where(self.space.contains(y), log_density, torch.full_like(log_density, -torch.inf))
        return torch.where(y.isnan().any(-1), torch.full_like(log_density, torch.nan), log_density)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log-density in user units, (*S, B, D) to (*S, B)."""
        return self.log_density(y) - self.log_partition

    def user_density(self, z: Tensor) -> Tensor:
        """Log-density in user units up to log Z at model values, (S, B, D) to (S, B)."""
        return self.f(z) + self.jacobian(z)

    def jacobian(self, z: Tensor) -> Tensor:
        """Log-determinant of the map to model space at model values, (S, B, D) to (S, B)."""
        return self.space.log_abs_det_jacobian(self.space.to_user(z)).to(self.dtype)

    def point_density(self) -> Tensor:
        """Log-density in user units up to log Z at the nodes, shape (M, B)."""
        density = self.nodes.log_density(self.f) + self.jacobian(self.nodes.y.to(self.dtype))
        return self._with_margins(density, self.space.to_user(self.nodes.y))

    # Ends of an interval ---------------------------------------------------------------------------------------------
    # All model values beyond a margin are targets within a millionth of the width from an end; a margin's probability
    # is theirs, and spread evenly over it.

    @cached_property
    def has_margins(self) -> bool:
        """Whether the target is an interval of one dimension."""
        return self.dim == 1 and bool((ends.margins(self.space) != ends.bounds(self.space)).any())

    @cached_property
    def _margin_levels(self) -> Tensor:
        """The cdf at the inner ends of both margins, shape (2, B), in double precision."""
        z = self.space.to_model(ends.margins(self.space)).to(self.dtype)
        return self.nodes.cdf(z.expand(2, self.f.batch_size)).double()

    def _with_margins(self, log_density: Tensor, y: Tensor) -> Tensor:
        """Log-densities up to log Z at user values (*S, B, 1), with those in a margin replaced by the margin's own."""
        if not self.has_margins:
            return log_density
        first, last = ends.margins(self.space)
        value = y[..., 0]
        if not bool(((value <= first) | (value >= last)).any()):
            return log_density
        below, above = self.margin_density.to(log_density.dtype)
        return torch.where(value <= first, below, torch.where(value >= last, above, log_density))

    @cached_property
    def margin_density(self) -> Tensor:
        """Log-density up to log Z within the lower and the upper margin, shape (2, B), in double precision."""
        high, inner = ends.bounds(self.space)[1], ends.margins(self.space)
        below, above = self._margin_levels
        masses = torch.stack([below, 1 - above])
        spread = (masses.clamp_min(LEAST_MASS) / (high - inner[1])).log() + self.log_partition
        # Where hardly anything is beyond, differences of cumulative probabilities have no digits.
        z = self.space.to_model(inner[:, None]).to(self.dtype)
        return torch.where(masses > LEAST_MASS, spread, self.user_density(z).double())

    # One dimension ---------------------------------------------------------------------------------------------------

    def _cut(self) -> Tensor:
        """Probability between the cut of the model's circle and that of the user's, shape (1, B)."""
        circle = self.space.parts[0] if isinstance(self.space, Product) else self.space
        assert isinstance(circle, Circle)
        low = torch.full((1, 1, 1), circle.low, dtype=torch.double, device=self.f.context.device)
        z = self.space.to_model(low)[..., 0].to(self.dtype)
        return self.nodes.cdf(z.expand(1, self.f.batch_size))

    def _user_points(self) -> WeightedPoints:
        """The points in user units, whose order there begins at the user's cut of a circle.

        A cdf of points is 1 from the last point on, so that no cut can be subtracted from it as from that of cells.
        """
        return replace(self.points, y=self.space.to_user(self.points.y))

    def cdf(self, y: Tensor) -> Tensor:
        """Cumulative probabilities of user values, (S, B) to (S, B)."""
        if not self.is_line:
            return self._user_points().cdf(y)
        level = self.nodes.cdf(self.space.to_model(y[..., None]).to(self.dtype)[..., 0])
        level = torch.where(y.isnan(), torch.full_like(level, torch.nan), level)
        if self.space.periodic[0]:
            return (level - self._cut()).remainder(1)
        if self.has_margins:
            (low, high), (first, last) = ends.bounds(self.space), ends.margins(self.space)
            below, above = self._margin_levels
            level = torch.where(y <= first, below * (y - low) / (first - low), level)
            level = torch.where(y >= last, torch.lerp(above, torch.ones_like(above), (y - last) / (high - last)), level)
        # Beyond the space the cdf is 0 or 1, whichever side the point is on.
        middle = self.space.to_user(torch.zeros(1, 1, dtype=torch.double, device=y.device))[0, 0]
        known = self.space.contains(y[..., None]) | y.isnan()
        return torch.where(known, level, (y > middle).to(level.dtype))

    def icdf(self, level: Tensor) -> Tensor:
        """User values at probabilities, (S, B) to (S, B)."""
        if not self.is_line:
            return self._user_points().quantiles(level)[..., 0]
        if self.space.periodic[0]:
            level = (level.double() + self._cut()).remainder(1)
        y = self.space.to_user(self.nodes.quantiles(level))[..., 0]
        if self.has_margins:
            (low, high), (first, last) = ends.bounds(self.space), ends.margins(self.space)
            below, above = self._margin_levels
            y = torch.where(level < below, low + (first - low) * level / below, y)
            y = torch.where(level > above, last + (high - last) * (level - above) / (1 - above), y)
        return y

    # Summaries -------------------------------------------------------------------------------------------------------

    def model_mean(self) -> Tensor:
        """Mean in model space, for angles the direction of the mean vector, shape (B, D)."""
        weights, z = self.masses[..., None], self.nodes.y
        if not any(self.space.periodic):
            return (weights * z).sum(0)
        circular = torch.atan2((weights * z.sin()).sum(0), (weights * z.cos()).sum(0))
        return torch.where(self.angle, circular, (weights * z).sum(0))

    def mean(self) -> Tensor:
        """Mean in user units, shape (B, D); on a circle the direction of the mean vector."""
        y, masses = self.space.to_user(self.nodes.y), self.masses
        if y.shape[1] == 1 and len(masses):
            mean = masses.T.to(y.dtype) @ y[:, 0]
        else:
            mean = (masses[..., None] * y).sum(0)
        if any(self.space.periodic):
            mean = torch.where(self.angle, self.space.to_user(self.model_mean()), mean)
        return mean

    def variance(self) -> Tensor:
        """Variance in squared user units, shape (B, D); on a circle that of the arc to the mean."""
        z = self.nodes.y
        deviation = self.space.to_user(z) - self.mean()
        if any(self.space.periodic):
            arc = (z - self.model_mean() + math.pi).remainder(2 * math.pi) - math.pi
            deviation = torch.where(self.angle, arc * self.space.scale, deviation)
        return (self.masses[..., None] * deviation.square()).sum(0)

    def entropy(self) -> Tensor:
        """Expected -log p, in nats of user units, shape (B,)."""
        masses = self.masses
        log_p = self.point_density() - self.log_partition
        return -torch.where(masses > 0, masses * log_p, torch.zeros_like(masses)).sum(0)  # 0 log 0 = 0

    def spread(self) -> Tensor:
        """Variance in model space, at most that of the standardised targets, shape (B, D)."""
        deviation = displacement(self.model_mean(), self.nodes.y, self.space.periodic)
        variance = (self.masses[..., None] * deviation.square()).sum(0)
        return variance.nan_to_num(1.0).clamp(1e-8, 1.0).to(self.dtype)

    def central_quantiles(self, levels: Tensor) -> Tensor:
        """Quantiles of each dimension in user units, (L,) to (L, B, D); of an angle counted from opposite the mean."""
        rows = levels[:, None].expand(-1, self.f.batch_size)
        if not any(self.space.periodic):
            return ends.snap(self.space, self.space.to_user(self.nodes.quantiles(rows)))
        z = self.nodes.quantiles(rows, self.model_mean(), self.angle)
        y = self.space.to_user(z)
        # Every angle is reported beyond the first by the length of the arc between them, whatever cut lies inside.
        arc = (z - z[:1]).remainder(2 * math.pi) * self.space.scale
        return torch.where(self.angle, y[:1] + arc, ends.snap(self.space, y))


class NodeCache:
    """Nodes of blocks for the next question, as far as a fraction of the memory budget goes.

    Args:
        memory_budget: Working memory in bytes.
    """

    def __init__(self, memory_budget: int) -> None:
        self.limit = KEPT_FRACTION * memory_budget
        self.kept: dict[tuple[int, int], Cells | WeightedPoints] = {}
        self.size = 0

    def get(self, rows: slice) -> Nodes | None:
        """The nodes of these rows, if they were kept."""
        kept = self.kept.get((rows.start, rows.stop))
        return None if kept is None else replace(kept)

    def keep(self, rows: slice, nodes: Any) -> Nodes:
        """Keep the nodes, if there is room, and return them."""
        plain = replace(nodes)  # without what was computed from them
        size = sum(getattr(getattr(plain, field.name), "nbytes", 0) for field in fields(plain))
        if self.size + size <= self.limit:
            self.kept[rows.start, rows.stop] = plain
            self.size += size
        return nodes


def refine_cells(
    integrator: AdaptiveQuadrature,
    energy: Callable[[Tensor], ReferencedEnergy],
    f: ReferencedEnergy,
    first: int,
    memory_budget: int,
) -> Cells:
    """Cells of an adaptive quadrature: shared ones, and own ones for the rows that need them.

    Args:
        integrator: The quadrature.
        energy: Gives the energy of some rows by their numbers.
        f: Energy of the block's rows.
        first: Number of its first row.
        memory_budget: Working memory in bytes.
    """
    cells = integrator.shared_cells(f)
    if f.is_reference:
        return cells
    pending = integrator.needs_refinement(f, cells).nonzero()[:, 0]
    if not len(pending):
        return cells
    count = len(cells.log_masses)
    edges = cells.edges[:, None].repeat(1, f.batch_size)
    centres = cells.centres[:, None].repeat(1, f.batch_size)
    log_masses = cells.log_masses.clone()
    # The head is looked up in a table where values at shared places cost next to nothing.
    floats = count * (min(f.floats_per_point(False), f.floats_per_point(True) + 64) + 32)
    block = max(memory_budget // (4 * floats), 1)
    for step in range(integrator.max_refinements):
        still = []
        for index in pending.split(block):
            before = (
                replace(cells, log_masses=log_masses[:, index]) if step == 0
                else Cells(edges[:, index], centres[:, index], log_masses[:, index])
            )  # fmt: skip
            refined = integrator.own_cells(energy(index + first), before)
            after = refined.log_partition_stderr
            # The first cells may have missed a peak and agreed on that; later ones must do better to stay.
            better = torch.ones_like(after, dtype=torch.bool) if step == 0 else ~(after >= before.log_partition_stderr)
            kept = index[better]
            edges[:, kept], centres[:, kept] = refined.edges[:, better], refined.centres[:, better]
            log_masses = log_masses.index_copy(1, kept, refined.log_masses[:, better])
            still.append(kept[~(after[better] <= integrator.tolerance)])
        pending = torch.cat(still)
        if not len(pending):
            break
    return Cells(edges, centres, log_masses, cells.reference)

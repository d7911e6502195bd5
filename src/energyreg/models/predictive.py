"""The predictive distribution p(y|x): a torch distribution in user units, computed from weighted points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.spaces import Circle, Product, TargetSpace
from energyreg.inference.ascent import displacement, merge, nearby, refine, separate_peaks
from energyreg.inference.energy import EnergyFunction
from energyreg.inference.integrators import AdaptiveQuadrature, ImportanceSampling, StratifiedQuadrature
from energyreg.inference.points import Cells, WeightedPoints, pareto_k

__all__ = ["Diagnostics", "HighestDensityRegion", "Modes", "PredictiveDistribution"]

Integrator: TypeAlias = AdaptiveQuadrature | StratifiedQuadrature | ImportanceSampling
Rows: TypeAlias = slice | Tensor

KEEP_SHARE = 1 / 4
"""Share of the memory budget up to which contexts, and nodes, are kept with a predictive distribution for the next
question, beside what a chunk works in; more is computed again."""

BLOCK = 64
"""Rows whose samples come from one seed where the proposal cannot share points, so that chunks change nothing."""


@dataclass(frozen=True)
class Diagnostics:
    """How far the numbers of a predictive distribution can be trusted, per row.

    Attributes:
        log_partition: Estimate of log Z(x), shape (B,).
        log_partition_stderr: Its standard error (for quadrature, half the disagreement of two interleaved halves),
            shape (B,).
        effective_sample_size: Kish's effective number of points, shape (B,).
        pareto_k: Shape of the weights' tail, shape (B,); above 0.7 do not trust the row. See
            :func:`energyreg.inference.points.pareto_k`.
        num_points: Points per row.
    """

    log_partition: Tensor
    log_partition_stderr: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor
    num_points: int


@dataclass(frozen=True)
class HighestDensityRegion:
    """The smallest region with a given probability, per row.

    Attributes:
        level: Probability of the region.
        log_threshold: The region is where log p(y|x) is at least this, in nats and user units, shape (B,).
        intervals: For D = 1 the region of each row as a union of intervals, a list of B tensors (k, 2); else None. On a
            circle an interval that crosses the cut has an upper end beyond the range.
        distribution: Where it comes from.
    """

    level: float
    log_threshold: Tensor
    intervals: list[Tensor] | None
    distribution: PredictiveDistribution

    def contains(self, y: Any) -> Tensor:
        """Whether each y, shape (*S, B, D), lies in the region of its row, shape (*S, B)."""
        return self.distribution.log_prob(y) >= self.log_threshold


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


@dataclass(frozen=True)
class _Chunk:
    """A block of rows with its energy function and what was computed from it."""

    rows: slice
    f: EnergyFunction
    integrate: Callable[[], Cells | WeightedPoints]

    @cached_property
    def nodes(self) -> Cells | WeightedPoints:
        """Cells where D = 1 by adaptive quadrature, points otherwise; made when first asked for."""
        return self.integrate()

    @property
    def cells(self) -> Cells | None:
        return self.nodes if isinstance(self.nodes, Cells) else None

    @cached_property
    def points(self) -> WeightedPoints:
        """The points in model space; shared by all rows where their second dimension is 1."""
        if isinstance(self.nodes, WeightedPoints):
            return self.nodes
        centres = self.nodes.centres.reshape(len(self.nodes.centres), -1, 1)
        return WeightedPoints(self.f.reference.from_unit(centres), self.nodes.log_masses, independent=False)

    @property
    def z(self) -> Tensor:
        """Points in model space, shape (M, B, D) or (M, 1, D)."""
        return self.points.y

    @property
    def log_weights(self) -> Tensor:
        return self.nodes.log_masses if isinstance(self.nodes, Cells) else self.nodes.log_weights

    @property
    def masses(self) -> Tensor:
        """Probabilities of the points, shape (M, B)."""
        return self.log_weights.softmax(0)

    @property
    def log_partition(self) -> Tensor:
        """Log Z, shape (B,); exactly 0, without any nodes, where f is the log-density of the base."""
        if self.f.normalised:
            return self.f.context.new_zeros(self.f.batch_size)
        return self.nodes.log_partition


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a probability between 0 and 1.")


class PredictiveDistribution(Distribution):
    """p(y|x) for B rows of x, in user units.

    In one dimension everything is deterministic: adaptive quadrature, and a cdf that is linear within its cells. In
    more, points come from the proposal (or, without one, from a grid) and the same seed gives the same result. Work is
    done in chunks of rows within a memory budget, which do not change the result. Nothing here carries a gradient,
    except `log_prob` and `prob` of a model in training mode.

    Made by calling a model.

    Args:
        energy: Gives the energy function of some rows.
        num_rows: B.
        space: Target space.
        integrator: How points are made.
        differentiable: Whether `log_prob` carries a gradient.
        dtype: Of what is returned.
        device: Of what is returned.
        seed: Of the points, where they are random.
        memory_budget: Working memory in bytes that chunks are sized by.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)
    has_rsample = False

    def __init__(
        self,
        energy: Callable[[Rows], EnergyFunction],
        num_rows: int,
        space: TargetSpace,
        integrator: Integrator,
        *,
        differentiable: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        memory_budget: int = 256 * 2**20,
    ) -> None:
        if isinstance(integrator, AdaptiveQuadrature) and space.dim != 1:
            raise ValueError(f"AdaptiveQuadrature is for one dimension, but the target has {space.dim}.")
        if isinstance(integrator, StratifiedQuadrature) and space.dim > 2:
            raise ValueError(f"Quadrature is for at most two dimensions, but the target has {space.dim}.")
        self._energy, self._space, self.integrator = energy, space, integrator
        self._differentiable, self._dtype, self._device = differentiable, dtype, torch.device(device)
        self._seed, self._budget = seed, memory_budget
        self._cached: list[_Chunk] | None = None
        self._kept: dict[tuple[int, int], Cells | WeightedPoints] = {}
        self._kept_bytes = 0
        super().__init__(torch.Size([num_rows]), torch.Size([space.dim]), validate_args=False)

    def __repr__(self) -> str:
        """Shapes, space and integrator."""
        return (
            f"PredictiveDistribution(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}, "
            f"space={self._space}, integrator={self.integrator})"
        )

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors; points outside the target space have log-density -inf."""
        return constraints.real_vector

    @property
    def _dim(self) -> int:
        return self.event_shape[0]

    @property
    def _rows(self) -> int:
        return self.batch_shape[0]

    # Chunks ----------------------------------------------------------------------------------------------------------

    def _num_points(self) -> int:
        """Points per row."""
        if isinstance(self.integrator, ImportanceSampling):
            return self.integrator.num_samples
        if isinstance(self.integrator, StratifiedQuadrature):
            return self.integrator.per_dimension(self._dim) ** self._dim
        return self.integrator.num_nodes

    def _chunk_size(self) -> int:
        f = self._energy(slice(0, 1))
        count, shared = self._num_points(), not isinstance(self.integrator, ImportanceSampling)
        if not shared and not isinstance(f.q, GaussianMixture):
            return BLOCK
        # Besides the energy itself: weights, masses and cumulative sums in double precision.
        floats = count * (f.floats_per_point(shared) + 16 + 4 * self._dim)
        size = max(self._budget // (4 * floats), 1)
        return size if size < BLOCK else size // BLOCK * BLOCK

    def _chunks(self) -> list[_Chunk] | map[_Chunk]:
        """The chunks; kept for the next question where a single one holds all rows."""
        if self._cached is not None:
            return self._cached
        size = self._chunk_size()
        slices = [slice(start, min(start + size, self._rows)) for start in range(0, self._rows, size)]
        if len(slices) == 1:
            self._cached = [self._compute(slices[0])]
            return self._cached
        return map(self._compute, slices)

    def _keep(self, rows: slice, nodes: Cells | WeightedPoints) -> Cells | WeightedPoints:
        """Nodes for the next question, as far as a share of the memory budget goes."""
        plain = replace(nodes)  # without what was computed from them
        size = sum(getattr(plain, field.name).nbytes for field in fields(plain) if field.name != "independent")
        if not self._differentiable and self._kept_bytes + size <= KEEP_SHARE * self._budget:
            self._kept[rows.start, rows.stop] = plain
            self._kept_bytes += size
        return nodes

    def _compute(self, rows: slice) -> _Chunk:
        f, kept = self._energy(rows), self._kept.get((rows.start, rows.stop))
        return _Chunk(rows, f, lambda: self._keep(rows, self._integrate(f, rows)) if kept is None else replace(kept))

    def _integrate(self, f: EnergyFunction, rows: slice) -> Cells | WeightedPoints:
        if isinstance(self.integrator, AdaptiveQuadrature):
            return self._adapt(f, rows, self.integrator.shared_cells(f))
        if isinstance(self.integrator, StratifiedQuadrature):
            return replace(self.integrator, jitter=False)(f)
        # Points shared by all rows need one seed; others get one per block of rows.
        shared = isinstance(f.q, GaussianMixture)
        generator = torch.Generator().manual_seed(self._seed if shared else self._seed + rows.start)
        sampler = ImportanceSampling(self.integrator.num_samples, self.integrator.stratified, quasi_random=shared)
        return sampler(f, f.q, generator=generator)

    def _adapt(self, f: EnergyFunction, rows: slice, cells: Cells) -> Cells:
        assert isinstance(self.integrator, AdaptiveQuadrature)
        if f.is_reference:
            return cells
        pending = self.integrator.needs_refinement(f, cells).nonzero()[:, 0]
        if not len(pending):
            return cells
        count = len(cells.log_masses)
        edges = cells.edges[:, None].repeat(1, f.batch_size)
        centres = cells.centres[:, None].repeat(1, f.batch_size)
        log_masses = cells.log_masses.clone()
        floats = count * (f.floats_per_point(False) + 32)
        block = max(self._budget // (4 * floats), 1)
        for step in range(self.integrator.max_refinements):
            still = []
            for index in pending.split(block):
                part = self._energy(index + rows.start)
                refined = self.integrator.own_cells(
                    part, Cells(edges[:, index], centres[:, index], log_masses[:, index])
                )
                before = Cells(edges[:, index], centres[:, index], log_masses[:, index]).log_partition_stderr
                after = refined.log_partition_stderr
                # The first cells may have missed a peak and agreed on that; later ones must do better to stay.
                better = torch.ones_like(after, dtype=torch.bool) if step == 0 else ~(after >= before)
                kept = index[better]
                edges[:, kept], centres[:, kept] = refined.edges[:, better], refined.centres[:, better]
                log_masses = log_masses.index_copy(1, kept, refined.log_masses[:, better])
                still.append(kept[~(after[better] <= self.integrator.tolerance)])
            pending = torch.cat(still)
            if not len(pending):
                break
        return Cells(edges, centres, log_masses)

    def _gather(self, function: Callable[[_Chunk], Tensor], dim: int = 0) -> Tensor:
        """Apply a function to each chunk and join the results along their row dimension."""
        with torch.no_grad():
            parts = [function(chunk) for chunk in self._chunks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    # Input -----------------------------------------------------------------------------------------------------------

    def _as_target(self, y: Any, name: str = "y") -> Tensor:
        """Targets as a tensor that broadcasts to (*S, B, D)."""
        y = torch.as_tensor(y)
        if not y.is_floating_point():
            y = y.to(self._dtype)
        y = y.to(self._device)
        if self._dim == 1 and y.ndim <= 1:
            y = y[..., None]
        if y.ndim < 1 or y.shape[-1] != self._dim or (y.ndim > 1 and y.shape[-2] not in (1, self._rows)):
            short = f", or ({self._rows},)" if self._dim == 1 else ""
            raise ValueError(
                f"{name} has shape {tuple(y.shape)}; expected (*S, {self._rows}, {self._dim}){short} for {self._rows} "
                f"rows of x "
                f"and {self._dim} target dimension(s)."
            )
        if y.ndim == 1:
            y = y[None]
        return y.expand(*y.shape[:-2], self._rows, self._dim)

    def _as_levels(self, value: Any, name: str) -> Tensor:
        """Values per row that broadcast to (*S, B)."""
        value = torch.as_tensor(value).to(self._device)
        if not value.is_floating_point():
            value = value.to(self._dtype)
        try:
            return value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        except RuntimeError:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, which does not broadcast to (*S, {self._rows}) for "
                f"{self._rows} rows."
            ) from None

    def _one_dimensional(self, what: str) -> None:
        if self._dim != 1:
            raise NotImplementedError(f"{what} is for one target dimension; this target has {self._dim}.")

    # Density ---------------------------------------------------------------------------------------------------------

    def log_prob(self, value: Any) -> Tensor:
        """Log-density in nats and user units.

        Args:
            value: Targets in user units, shape (*S, B, D), or (B,) for D = 1.

        Returns:
            Shape (*S, B); -inf outside the target space.

        Raises:
            ValueError: If the shape is another.
        """
        y = self._as_target(value)
        if self._differentiable and torch.is_grad_enabled():
            return self._log_prob(self._compute(slice(0, self._rows)), y)
        return self._gather(lambda chunk: self._log_prob(chunk, y[..., chunk.rows, :]), -1)

    def _log_prob(self, chunk: _Chunk, y: Tensor) -> Tensor:
        return self._log_density(chunk.f, y) - chunk.log_partition

    def _log_density(self, f: EnergyFunction, y: Tensor) -> Tensor:
        """The same up to log Z, for which alone a chunk must make its nodes."""
        # Points outside stand somewhere inside in model space, so that no NaN arises, and are set to -inf at the end.
        z = self._space.to_model(y).to(self._dtype)
        log_density = f(z) + self._space.log_abs_det_jacobian(y).to(self._dtype)
        return torch.where(self._space.contains(y), log_density, torch.full_like(log_density, -torch.inf))

    def prob(self, value: Any) -> Tensor:
        """Density in user units, shape (*S, B); see `log_prob`."""
        return self.log_prob(value).exp()

    # One dimension: the cdf and its inverse --------------------------------------------------------------------------

    def _unit(self, chunk: _Chunk, y: Tensor) -> Tensor:
        """Unit coordinates of user values, (S, B) to (S, B)."""
        return chunk.f.reference.to_unit(self._space.to_model(y[..., None]).to(self._dtype))[..., 0]

    def _angle_level(self, chunk: _Chunk, z: Tensor) -> Tensor:
        """Probability between the cut of the model's circle and the angle z, (B,) to (1, B)."""
        assert chunk.cells is not None
        return chunk.cells.cdf(chunk.f.reference.to_unit(z[:, None].to(self._dtype)).T)

    def _start_level(self, chunk: _Chunk) -> Tensor:
        """The same for the cut of the user's circle, shape (1, B)."""
        circle = self._space.spaces[0] if isinstance(self._space, Product) else self._space
        assert isinstance(circle, Circle)
        low = torch.full((chunk.f.batch_size, 1), circle.low, dtype=torch.double, device=self._device)
        return self._angle_level(chunk, self._space.to_model(low)[:, 0])

    def _model_quantiles(self, chunk: _Chunk, level: Tensor) -> Tensor:
        """Model-space values at levels in double precision, (S, B) to (S, B); D = 1 with cells."""
        assert chunk.cells is not None
        return chunk.f.reference.from_unit(chunk.cells.icdf(level)[..., None].to(self._dtype))[..., 0]

    def cdf(self, value: Any) -> Tensor:
        """Cumulative distribution function for D = 1; on a circle from the lower end of its range on.

        Args:
            value: Targets in user units, shape (*S, B, 1), or (B,).

        Returns:
            Probabilities, shape (*S, B).

        Raises:
            NotImplementedError: If D > 1.
        """
        self._one_dimensional("cdf")
        y = self._as_target(value)[..., 0]
        flat = y.reshape(-1, self._rows)
        result = self._gather(lambda chunk: self._chunk_cdf(chunk, flat[:, chunk.rows]), -1)
        return result.reshape(y.shape).to(self._dtype)

    def _chunk_cdf(self, chunk: _Chunk, y: Tensor) -> Tensor:
        if chunk.cells is None:
            points, weights = self._space.to_user(chunk.points.y)[..., 0], chunk.masses
            return torch.stack([(weights * (points <= row)).sum(0) for row in y])
        level = chunk.cells.cdf(self._unit(chunk, y))
        if self._space.periodic[0]:
            return (level - self._start_level(chunk)).remainder(1)
        # Beyond the space the cdf is 0 or 1, whichever side the point is on.
        middle = self._space.to_user(torch.zeros(1, 1, dtype=torch.double, device=self._device))[0, 0]
        return torch.where(self._space.contains(y[..., None]), level, (y > middle).double())

    def icdf(self, value: Any) -> Tensor:
        """Inverse of `cdf` for D = 1.

        Args:
            value: Probabilities in [0, 1] that broadcast to (*S, B).

        Returns:
            Targets in user units, shape (*S, B).

        Raises:
            NotImplementedError: If D > 1.
            ValueError: If a value lies outside [0, 1].
        """
        self._one_dimensional("icdf")
        level = self._as_levels(value, "value")
        if not bool(((level >= 0) & (level <= 1)).all()):
            raise ValueError("value holds numbers outside [0, 1]; expected probabilities.")
        flat = level.reshape(-1, self._rows)
        result = self._gather(lambda chunk: self._chunk_icdf(chunk, flat[:, chunk.rows]), -1)
        return result.reshape(level.shape).to(self._dtype)

    def _chunk_icdf(self, chunk: _Chunk, level: Tensor) -> Tensor:
        if chunk.cells is None:
            points = WeightedPoints(self._space.to_user(chunk.points.y), chunk.log_weights)
            return points.quantiles(level)[..., 0]
        level = level.double()
        if self._space.periodic[0]:
            level = (level + self._start_level(chunk)).remainder(1)
        return self._space.to_user(self._model_quantiles(chunk, level)[..., None])[..., 0]

    def quantile(self, level: Any) -> Tensor:
        """Quantiles for D = 1.

        Args:
            level: Probability, or several, shape (L,).

        Returns:
            Targets in user units, shape (B,), or (L, B).

        Raises:
            NotImplementedError: If D > 1; see `interval`.
        """
        level = torch.as_tensor(level, dtype=torch.double)
        return self.icdf(level[..., None].expand(*level.shape, self._rows))

    # Summaries -------------------------------------------------------------------------------------------------------

    def _angles(self) -> Tensor:
        return torch.tensor(self._space.periodic, device=self._device)

    def _model_mean(self, chunk: _Chunk) -> Tensor:
        """Mean in model space, for angles the direction of the mean vector, shape (B, D)."""
        weights, z = chunk.masses[..., None], chunk.z
        if not any(self._space.periodic):
            return (weights * z).sum(0)
        circular = torch.atan2((weights * z.sin()).sum(0), (weights * z.cos()).sum(0))
        return torch.where(self._angles(), circular, (weights * z).sum(0))

    def _chunk_mean(self, chunk: _Chunk) -> Tensor:
        y = self._space.to_user(chunk.z)
        if y.shape[1] == 1 and len(chunk.masses):
            mean = chunk.masses.T.to(y.dtype) @ y[:, 0]
        else:
            mean = (chunk.masses[..., None] * y).sum(0)
        if any(self._space.periodic):
            mean = torch.where(self._angles(), self._space.to_user(self._model_mean(chunk)), mean)
        return mean

    @property
    def mean(self) -> Tensor:
        """Mean in user units, shape (B, D); on a circle the direction of the mean vector."""
        return self._gather(self._chunk_mean).to(self._dtype)

    @property
    def variance(self) -> Tensor:
        """Variance in squared user units, shape (B, D); on a circle that of the arc to the mean."""

        def variance(chunk: _Chunk) -> Tensor:
            deviation = self._space.to_user(chunk.z) - self._chunk_mean(chunk)
            if any(self._space.periodic):
                arc = (chunk.z - self._model_mean(chunk) + math.pi).remainder(2 * math.pi) - math.pi
                deviation = torch.where(self._angles(), arc * self._space.scale, deviation)
            return (chunk.masses[..., None] * deviation.square()).sum(0)

        return self._gather(variance).to(self._dtype)

    def entropy(self) -> Tensor:
        r"""Differential entropy, the expected -log p(y|x), in nats of user units, shape (B,).

        .. math:: H = -\int p(y|x) \log p(y|x) dy

        For D ≤ 2 by quadrature where the points are one; from the proposal's samples it is a self-normalised estimate,
        whose error falls as one over the root of the effective sample size (see `diagnostics`).
        """

        def entropy(chunk: _Chunk) -> Tensor:
            masses = chunk.masses
            log_p = self._point_density(chunk) - chunk.log_partition
            return -torch.where(masses > 0, masses * log_p, torch.zeros_like(masses)).sum(0)  # 0 log 0 = 0

        return self._gather(entropy).to(self._dtype)

    @property
    def median(self) -> Tensor:
        """Median of each dimension, shape (B, D); on a circle counted from opposite the mean."""
        return self._central([0.5])[0]

    def interval(self, level: float = 0.9) -> Tensor:
        """Equal-tailed interval of each dimension's marginal.

        Args:
            level: Probability of the interval.

        Returns:
            Lower and upper end in user units, shape (B, 2) for D = 1, else (B, D, 2). On a circle the arc from the
            lower to the upper end, cut opposite the mean; its upper end may lie beyond the range.

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        _check_level(level)
        ends = self._central([(1 - level) / 2, (1 + level) / 2])
        return torch.stack([ends[0], ends[1]], -1).squeeze(1) if self._dim == 1 else torch.stack([ends[0], ends[1]], -1)

    def _central(self, levels: list[float]) -> Tensor:
        """Quantiles of each dimension in user units, shape (L, B, D), on a circle counted from opposite the mean."""

        def quantiles(chunk: _Chunk) -> Tensor:
            rows = torch.tensor(levels, dtype=torch.double, device=self._device)[:, None].expand(-1, chunk.f.batch_size)
            if not any(self._space.periodic):
                if chunk.cells is not None:
                    return self._space.to_user(self._model_quantiles(chunk, rows)[..., None])
                return self._space.to_user(WeightedPoints(chunk.points.y, chunk.log_weights).quantiles(rows))
            middle = self._model_mean(chunk)
            if chunk.cells is not None:
                opposite = (middle[:, 0] + 2 * math.pi).remainder(2 * math.pi) - math.pi
                level = (rows + self._angle_level(chunk, opposite)).remainder(1)
                z = self._model_quantiles(chunk, level)[..., None]
            else:
                wrapped = (chunk.points.y - middle + math.pi).remainder(2 * math.pi) - math.pi
                shifted = torch.where(self._angles(), wrapped, chunk.points.y)
                z = WeightedPoints(shifted, chunk.log_weights).quantiles(rows)
                z = torch.where(self._angles(), (z + middle + math.pi).remainder(2 * math.pi) - math.pi, z)
            y = self._space.to_user(z)
            # Every angle is reported beyond the first by the length of the arc between them, whatever cut lies inside.
            arc = (z - z[:1]).remainder(2 * math.pi) * self._space.scale
            return torch.where(self._angles(), y[:1] + arc, y)

        return self._gather(quantiles, 1).to(self._dtype)

    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples in user units.

        For D = 1 by the inverse of the cdf. For D > 1 by resampling the weighted points with replacement (within its
        cell where the points are a grid), so that many more samples than points repeat themselves; raise the
        integrator's num_samples then.

        Args:
            sample_shape: Leading shape S.
            generator: Source of randomness, on the CPU; torch's global one by default.

        Returns:
            Samples, shape (*S, B, D).
        """
        shape = torch.Size(sample_shape)
        count = shape.numel()
        uniforms = torch.rand((count, self._rows), generator=generator, dtype=torch.double).to(self._device)
        grid = isinstance(self.integrator, StratifiedQuadrature)
        offsets = torch.rand((count, self._rows, self._dim), generator=generator).to(self._device) if grid else None

        def draw(chunk: _Chunk) -> Tensor:
            level = uniforms[:, chunk.rows]
            if chunk.cells is not None:
                z = self._model_quantiles(chunk, level)[..., None]
            else:
                index = WeightedPoints(chunk.points.y, chunk.log_weights).indices_at(level)
                if offsets is not None:
                    z = self._within_cell(chunk.f, index, offsets[:, chunk.rows])
                else:
                    z = chunk.points.y.gather(0, index[..., None].expand(-1, -1, self._dim))
            return self._space.to_user(z)

        return self._gather(draw, 1).to(self._dtype).reshape(*shape, self._rows, self._dim)

    def _within_cell(self, f: EnergyFunction, index: Tensor, offset: Tensor) -> Tensor:
        """Model values of points spread over their grid cells: index (S, B) and offset (S, B, D) in (0, 1)."""
        assert isinstance(self.integrator, StratifiedQuadrature)
        n = self.integrator.per_dimension(self._dim)
        powers = n ** torch.arange(self._dim - 1, -1, -1, device=index.device)  # the last dimension runs fastest
        t = (index[..., None] // powers % n + offset) / n
        return f.reference.from_unit(self.integrator.unit(t.to(self._dtype), f)[0])

    # Modes and regions -----------------------------------------------------------------------------------------------

    def _user_density(self, f: EnergyFunction, z: Tensor) -> Tensor:
        """Log-density in user units up to log Z at model values, (S, B, D) to (S, B)."""
        return f(z) + self._space.log_abs_det_jacobian(self._space.to_user(z)).to(self._dtype)

    def _point_density(self, chunk: _Chunk) -> Tensor:
        """The same at the chunk's own points, shape (M, B)."""
        if chunk.cells is None:
            return self._user_density(chunk.f, chunk.points.y)
        relative = chunk.cells.log_masses - chunk.cells.log_widths.to(self._dtype)
        z = chunk.z.to(self._dtype)
        jacobian = self._space.log_abs_det_jacobian(self._space.to_user(z)).to(self._dtype)
        return relative + chunk.f.reference.log_prob(z) + jacobian

    def _spread(self, chunk: _Chunk) -> Tensor:
        """Variance in model space, at most that of the standardised targets, shape (B, D)."""
        deviation = displacement(self._model_mean(chunk), chunk.z, self._space.periodic)
        variance = (chunk.masses[..., None] * deviation.square()).sum(0)
        return variance.nan_to_num(1.0).clamp(1e-8, 1.0).to(self._dtype)

    def _blocks(self, chunk: _Chunk, count: int, floats: int) -> int:
        """How many of `count` points per row fit the memory budget at once, with these floats besides the energy's."""
        size = chunk.f.batch_size * (floats + chunk.f.floats_per_point(False))
        return min(max(self._budget // (4 * size), 1), max(count, 1))

    def _climb(self, chunk: _Chunk, z: Tensor, step_size: Any, num_steps: int, decay: float = 0.5) -> Tensor:
        """Climb the density in user units from model values, (S, B, D) to (S, B, D)."""
        # The gradient keeps about three times what a value needs.
        size = self._blocks(chunk, len(z), 3 * chunk.f.floats_per_point(False) + 16 * self._dim)
        options: dict[str, Any] = {"num_steps": num_steps, "decay": decay, "periodic": self._space.periodic}
        parts = [
            refine(lambda z: self._user_density(chunk.f, z), part, step_size=step_size, **options)
            for part in z.split(size)
        ]
        return torch.cat(parts)

    def refine(
        self,
        initial: Any,
        *,
        num_steps: int = 10,
        step_size: float | Sequence[float] | Tensor | None = None,
        decay: float = 0.5,
    ) -> Tensor:
        r"""Improve initial estimates by gradient ascent on the density, as papers I to III predict.

        The function that is climbed is the log-density in user units, so that a mode means what the user sees and
        `log_prob` never falls; the steps are taken in model space, where no step leaves the target space:

        .. math:: z \leftarrow z + \lambda \nabla_z \left( f(x, z) + \log \left| \det \frac{dz}{dy} \right| \right)

        A step after which the density is lower is taken back and shortened. An estimate where the density is 0 or NaN
        stays where it is.

        Args:
            initial: Initial estimates in user units, shape (*S, B, D), or (B,) for D = 1: a detector's, or samples.
            num_steps: Steps T.
            step_size: Length λ in model space, that is of standardised targets (radians for an angle): a number, or one
                per dimension (D,). By default half the variance of each row and dimension.
            decay: Factor that shortens a rejected step, in (0, 1).

        Returns:
            Refined estimates in user units, shape (*S, B, D), in the dtype of the initial ones, but not below the
            model's.

        Raises:
            ValueError: If initial has another shape, or estimates that are not finite or lie outside the target space;
                or if num_steps, step_size or decay are out of their range.

        Source:
            Gustafsson et al., ECCV 2020 (prediction by gradient ascent).
        """
        y = self._as_target(initial, "initial")
        y = y.to(torch.promote_types(y.dtype, self._dtype))
        self._check_estimates(y)
        if step_size is not None:
            step_size = torch.as_tensor(step_size)
            if step_size.ndim > 1 or (step_size.ndim and len(step_size) != self._dim):
                found = f"length {len(step_size)}" if step_size.ndim == 1 else f"shape {tuple(step_size.shape)}"
                raise ValueError(
                    f"step_size has {found}; expected one number, or {self._dim}, one per target dimension."
                )
        flat = y.reshape(-1, self._rows, self._dim)

        def climb(chunk: _Chunk) -> Tensor:
            start = flat[:, chunk.rows]
            step = self._spread(chunk) / 2 if step_size is None else step_size
            z = self._climb(chunk, self._space.to_model(start).to(self._dtype), step, num_steps, decay)
            found = self._space.to_user(z).to(y.dtype)
            size = self._blocks(chunk, len(start), 16 * self._dim)
            # The way to model space and back rounds; a gain that is lost on it is none.
            kept = [
                torch.where((self._log_density(chunk.f, b) >= self._log_density(chunk.f, a))[..., None], b, a)
                for a, b in zip(start.split(size), found.split(size), strict=True)
            ]
            return torch.cat(kept)

        return self._gather(climb, 1).reshape(y.shape)

    def _check_estimates(self, y: Tensor) -> None:
        outside = ~self._space.contains(y)
        if outside.any():
            first = outside.nonzero()[0].tolist()
            raise ValueError(
                f"initial has {int(outside.sum())} of {outside.numel()} rows that are not finite or lie outside "
                f"{self._space!r}, the first at index {tuple(first)}: {y[tuple(first)].tolist()}; drop these rows, or "
                f"move them inside."
            )

    @property
    def mode(self) -> Tensor:
        """Highest mode of the density in user units, shape (B, D): the best point, refined on f; see `modes`."""

        def climb(chunk: _Chunk) -> Tensor:
            best = self._point_density(chunk).argmax(0, keepdim=True)
            if chunk.cells is not None:
                return self._space.to_user(self._from_unit(chunk, self._zoom(chunk, best))[0, :, None])
            found = self._climb(chunk, self._points_at(chunk, best), self._spread(chunk) / 2, num_steps=50)
            return self._space.to_user(found[0])

        return self._gather(climb).to(self._dtype)

    def _points_at(self, chunk: _Chunk, index: Tensor) -> Tensor:
        """The points with the given indices, (S, B), in model space, shape (S, B, D)."""
        z = chunk.points.y.to(self._dtype).expand(-1, chunk.f.batch_size, -1)
        return z.gather(0, index[..., None].expand(-1, -1, self._dim))

    def _from_unit(self, chunk: _Chunk, u: Tensor) -> Tensor:
        """Model values at unit coordinates, on a circle also beyond (0, 1); D = 1, any shape."""
        if self._space.periodic[0]:
            u = u.remainder(1)
        return chunk.f.reference.from_unit(u[..., None].to(self._dtype))[..., 0]

    def _zoom(self, chunk: _Chunk, cell: Tensor, lowest: bool = False) -> Tensor:
        """Narrow the brackets around the highest (or lowest) cells, (K, B), to unit coordinates, by grids of nine."""
        assert chunk.cells is not None
        centres = chunk.cells.row_centres
        if self._space.periodic[0]:
            padded = torch.cat([centres[-1:] - 1, centres, centres[:1] + 1])
        else:
            # Not the very ends, which rounding in user units may put outside a window.
            first, last = (centres[:1] / 2).clamp_max(1e-6), ((1 + centres[-1:]) / 2).clamp_min(1 - 1e-6)
            padded = torch.cat([first, centres, last])
        low, high = padded.gather(0, cell), padded.gather(0, cell + 2)
        steps = torch.linspace(0, 1, 9, dtype=torch.double, device=low.device)[:, None, None]
        size = self._blocks(chunk, len(cell), 64)
        for _ in range(5):
            grid = torch.lerp(low, high, steps)
            z = self._from_unit(chunk, grid)[..., None].split(max(size // 9, 1), 1)
            density = torch.cat([self._user_density(chunk.f, part) for part in z], 1)
            index = density.argmin(0, keepdim=True) if lowest else density.argmax(0, keepdim=True)
            low = grid.gather(0, (index - 1).clamp_min(0))[0]
            high, middle = grid.gather(0, (index + 1).clamp_max(8))[0], grid.gather(0, index)[0]
        return middle

    def modes(
        self,
        *,
        tolerance: float = 0.01,
        min_prominence: float = 0.05,
        min_probability: float = 1e-3,
        num_starts: int = 128,
        num_steps: int = 100,
    ) -> Modes:
        r"""The modes of every row's density in user units, each with the probability of its basin of attraction.

        In one dimension, from the nodes of the quadrature: the basins end at the valleys between the modes, and their
        probabilities are as good as the cdf. With weighted points (D > 1), by gradient ascent from points that are
        resampled from them, and from the best one: the probability of a mode is the share of the starts that end in it,
        with a standard error of about :math:`\sqrt{p (1 - p) / \text{num\_starts}}`. The same seed of the predictive
        distribution gives the same modes.

        Of two neighbours only the higher one counts where they are closer than the tolerance, or where the valley
        between them is not min_prominence below the lower one. (For D > 1 the valley is the lowest density on the
        straight line between them, so that a curved ridge may count as several modes.) The highest mode is always
        there, and is the property `mode` except where several are equally high.

        Args:
            tolerance: Distance in model space, that is of standardised targets (radians for an angle).
            min_prominence: In nats. Learned densities have ripples; 0 keeps them all.
            min_probability: A mode of less counts as part of its neighbour, unless it is the highest of all.
            num_starts: Starts per row, for D > 1.
            num_steps: Steps of gradient ascent, for D > 1.

        Returns:
            The modes of each row, by descending probability.

        Raises:
            ValueError: If an argument is out of its range.
        """
        for name, number in {"tolerance": tolerance, "min_prominence": min_prominence}.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} is {number}; expected a finite number ≥ 0.")
        if not 0 <= min_probability < 1:
            raise ValueError(f"min_probability is {min_probability}; expected a probability in [0, 1).")
        for name, number, least in (("num_starts", num_starts, 1), ("num_steps", num_steps, 0)):
            if isinstance(number, bool) or int(number) != number or number < least:
                raise ValueError(f"{name} is {number}; expected a whole number ≥ {least}.")
        thresholds = {
            "tolerance": tolerance, "min_prominence": min_prominence, "min_probability": min_probability,
        }  # fmt: skip
        values, log_prob, probabilities = [], [], []
        with torch.no_grad():
            for chunk in self._chunks():
                if chunk.cells is not None:
                    z, mass, kept = self._line_modes(chunk, **thresholds)
                else:
                    z, mass, kept = self._point_modes(chunk, num_starts, num_steps, **thresholds)
                order = torch.where(kept, mass, -1.0).argsort(dim=0, descending=True, stable=True)
                y = self._space.to_user(z.gather(0, order[..., None].expand_as(z))).to(self._dtype)
                height, mass, kept = self._log_prob(chunk, y).T, mass.gather(0, order).T, kept.gather(0, order).T
                counts = kept.sum(1).tolist()
                values += y.transpose(0, 1)[kept].split(counts)
                log_prob += height[kept].split(counts)
                probabilities += mass[kept].to(self._dtype).split(counts)
        return Modes(values, log_prob, probabilities)

    def _line_modes(
        self, chunk: _Chunk, tolerance: float, min_prominence: float, min_probability: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Modes of D = 1 from the cells: model values (K, B, 1), probabilities (K, B), and which entries are modes."""
        assert chunk.cells is not None
        density, masses = self._point_density(chunk), chunk.masses
        z = chunk.z[..., 0].expand_as(density)
        cell = torch.arange(len(density), device=density.device)[:, None].expand_as(density)
        circle = self._space.periodic[0]
        if circle:
            # Cut where the density is lowest: that point belongs to no mode's top, so that the rest is a line.
            cell = (cell + density.argmin(0)) % len(density)
            density, masses, z = (table.gather(0, cell) for table in (density, masses, z))
            z = z + 2 * math.pi * (z < z[:1])
        top, valley, count = separate_peaks(
            density, z, masses,
            tolerance=tolerance, min_prominence=min_prominence, min_probability=min_probability,
        )  # fmt: skip
        z = self._from_unit(chunk, self._zoom(chunk, cell.gather(0, top)))
        border = self._zoom(chunk, cell.gather(0, torch.cat([torch.zeros_like(top[:1]), valley])), lowest=True)
        level = chunk.cells.cdf(border.remainder(1) if circle else border)
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
            height = self._user_density(chunk.f, torch.stack([a, b])[..., None])
            one = (count > 1) & (displacement(a[:, None], b[:, None], (True,))[:, 0].abs() < tolerance)
            lower = torch.where(height[0] < height[1], ends[0], ends[1])
            higher = ends.sum(0) - lower
            mass = torch.where(one & (rank == higher), both, mass)
            kept = kept & ~(one & (rank == lower))
        return z[..., None], mass, kept

    def _point_modes(
        self,
        chunk: _Chunk,
        num_starts: int,
        num_steps: int,
        tolerance: float,
        min_prominence: float,
        min_probability: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Modes from weighted points: model values (K, B, D), probabilities (K, B), and which entries are modes."""
        periodic, rows, spread = self._space.periodic, chunk.f.batch_size, self._spread(chunk)
        # One random level in each of as many equal strata of the points' cdf, the same for all rows. (Not evenly spaced
        # ones: every 32nd point of a Sobol sequence lies in the same corner.)
        jitter = torch.rand(num_starts, generator=torch.Generator().manual_seed(self._seed), dtype=torch.double)
        levels = ((torch.arange(num_starts) + jitter) / num_starts).to(spread.device)
        index = WeightedPoints(chunk.points.y, chunk.log_weights).indices_at(levels[:, None].expand(-1, rows))
        best = self._point_density(chunk).argmax(0, keepdim=True)
        z = self._points_at(chunk, torch.cat([best, index]))
        share = torch.full((len(z), rows), 1 / num_starts, dtype=torch.double, device=z.device)
        share[0] = 0.0  # the best point is no draw: it is there for the sake of the highest mode
        # Twice: what has not arrived goes on from fresh steps, now that it is few. Of another length, as one that is
        # twice the variance at a top jumps from side to side and gets nowhere.
        for share_of_spread in (1 / 2, 1 / 3):
            z = self._climb(chunk, z, share_of_spread * spread, num_steps)
            z, height, share = self._by_height(chunk, z, share)
            z, height, share = merge(z, height, share, nearby(z, height, tolerance, periodic))
        z, height, share = merge(z, height, share, self._over_passes(chunk, z, height, spread, min_prominence))
        small = (share < min_probability) & (height > -math.inf)
        small[0] = False  # the highest
        if small.any():
            distance = self._distances(z, spread).masked_fill(small[:, None] | (height == -math.inf)[:, None], math.inf)
            own = torch.arange(len(z), device=z.device)[:, None]
            z, height, share = merge(z, height, share, torch.where(small, distance.argmin(0), own))
        kept = height > -math.inf
        kept[0] = True
        return z, share, kept

    def _by_height(self, chunk: _Chunk, z: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points, heights and shares, the highest of each row first."""
        size = self._blocks(chunk, len(z), 16 * self._dim)
        height = torch.cat([self._user_density(chunk.f, part) for part in z.split(size)]).nan_to_num(-math.inf)
        height, order = height.sort(dim=0, descending=True, stable=True)
        return z.gather(0, order[..., None].expand_as(z)), height, share.gather(0, order)

    def _distances(self, z: Tensor, spread: Tensor) -> Tensor:
        """Distances between points, in standard deviations, (K, B, D) to (K, K, B)."""
        return (displacement(z[:, None], z[None], self._space.periodic).square() / spread).sum(-1)

    def _over_passes(self, chunk: _Chunk, z: Tensor, height: Tensor, spread: Tensor, min_prominence: float) -> Tensor:
        """For each top, by descending height, the one that it belongs to for want of a valley between them, (K, B)."""
        own = torch.arange(len(z), device=z.device)[:, None].expand_as(height)
        if len(z) == 1:
            return own
        # Only the three nearest of the higher ones: a chain of neighbours does for the rest.
        higher = own[:, None] < own[None, :]  # (i, j): i comes before j
        distance = self._distances(z, spread).masked_fill(~higher | (height == -math.inf)[None], math.inf)
        distance, near = distance.topk(min(3, len(z)), 0, largest=False)
        target = z[:, None].expand(-1, len(z), -1, -1).gather(0, near[..., None].expand(*near.shape, self._dim))
        way = displacement(z[None], target, self._space.periodic)
        lowest = torch.full_like(distance, math.inf)
        flat = (len(near) * len(z), chunk.f.batch_size, self._dim)
        size = self._blocks(chunk, flat[0], 16 * self._dim)
        for share in torch.linspace(0, 1, 17, dtype=z.dtype)[1:-1].tolist():
            line = (z[None] + share * way).reshape(flat).split(size)
            density = torch.cat([self._user_density(chunk.f, part) for part in line])
            lowest = torch.minimum(lowest, density.reshape(lowest.shape).nan_to_num(-math.inf))
        barrier = torch.where(distance < math.inf, height - lowest, math.inf)
        least, which = barrier.min(0)
        parent = torch.where(least <= min_prominence, near.gather(0, which[None])[0], own)
        for _ in range(len(z).bit_length()):  # the parents' parents, down to the roots
            parent = parent.gather(0, parent)
        return parent

    def highest_density_region(self, level: float = 0.9) -> HighestDensityRegion:
        """The smallest region in user units with the given probability.

        Args:
            level: Probability of the region.

        Returns:
            For D = 1 with a union of intervals per row; for D > 1 as a threshold on the density.

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        _check_level(level)
        thresholds, intervals = [], []
        with torch.no_grad():
            for chunk in self._chunks():
                density, masses = self._point_density(chunk), chunk.masses
                ordered, order = density.sort(0, descending=True)
                cumulative = masses.gather(0, order).cumsum(0)
                last = (cumulative < level * cumulative[-1]).sum(0, keepdim=True).clamp_max(len(density) - 1)
                threshold = ordered.gather(0, last)[0]
                thresholds.append(threshold - chunk.log_partition)
                if chunk.cells is not None:
                    intervals += self._intervals(chunk, density, threshold)
        return HighestDensityRegion(level, torch.cat(thresholds), intervals if intervals else None, self)

    def _intervals(self, chunk: _Chunk, density: Tensor, threshold: Tensor) -> list[Tensor]:
        """The runs of cells at or above the threshold as intervals in user units, one tensor (k, 2) per row."""
        assert chunk.cells is not None
        inside = (density >= threshold).T  # (B, G)
        rows, count = inside.shape
        circle = self._space.periodic[0]
        padding = torch.zeros(rows, 1, dtype=torch.bool, device=inside.device)
        starts = inside & ~torch.cat([inside[:, -1:] if circle else padding, inside[:, :-1]], 1)
        stops = inside & ~torch.cat([inside[:, 1:], inside[:, :1] if circle else padding], 1)
        whole = inside.all(1)  # a circle all inside has no border; it is cut where the model is
        starts[:, 0] |= whole
        stops[:, -1] |= whole
        unit, height = chunk.cells.row_centres.T, (density - threshold).T.double()

        def crossing(cells: Tensor, step: int) -> Tensor:
            """Where the density, linear from a border cell to its neighbour outside, meets the threshold."""
            row, cell = cells.nonzero(as_tuple=True)
            neighbour = cell + step
            outer = (neighbour < 0) | (neighbour >= count)
            wrapped = neighbour % count
            here, there = height[row, cell], height[row, wrapped]
            share = (here / (here - there).clamp_min(1e-12)).clamp(0, 1)
            position = unit[row, wrapped] + torch.where(outer, float(step), 0.0)  # beyond the cut of a circle
            edge = torch.full_like(position, 0.0 if step < 0 else 1.0)
            position = position if circle else torch.where(outer, edge, position)
            share = share if circle else torch.where(outer, torch.ones_like(share), share)
            return torch.lerp(unit[row, cell], position, share)

        lower, upper = crossing(starts, -1), crossing(stops, 1)
        counts = starts.sum(1)
        if circle:
            # A run over the cut starts last and stops first in its row.
            first = counts.cumsum(0) - counts
            wraps = upper[first] < lower[first]
            order = torch.arange(len(upper), device=upper.device)
            row = torch.repeat_interleave(torch.arange(rows, device=upper.device), counts)
            shifted = torch.where(order + 1 < (first + counts)[row], order + 1, first[row])
            upper = torch.where(wraps[row], upper[shifted] + (shifted == first[row]), upper)
            z = [self._circle_angle(chunk, bound) for bound in (lower, upper)]
            start = self._space.to_user(((z[0] + math.pi).remainder(2 * math.pi) - math.pi)[:, None])[:, 0]
            stop = start + (z[1] - z[0]) * self._space.scale
        else:
            start, stop = (
                self._space.to_user(chunk.f.reference.from_unit(bound[:, None].to(self._dtype)))[:, 0]
                for bound in (lower, upper)
            )
        # A cell just at the threshold gives an interval of no length.
        solid = stop > start
        counts = counts.clone().index_add_(0, starts.nonzero()[:, 0], -(~solid).to(counts.dtype))
        return list(torch.stack([start, stop], -1)[solid].to(self._dtype).split(counts.tolist()))

    def _circle_angle(self, chunk: _Chunk, u: Tensor) -> Tensor:
        """Angles of unit coordinates on the circle that may lie a turn beyond (0, 1)."""
        turn = u.floor()
        z = chunk.f.reference.from_unit((u - turn)[:, None].to(self._dtype))[:, 0]
        return z.double() + 2 * math.pi * turn

    # Trust -----------------------------------------------------------------------------------------------------------

    @property
    def log_partition(self) -> Tensor:
        """Log Z in model space, shape (B,); exactly 0 where the energy is a log-density."""
        return self._gather(lambda chunk: chunk.log_partition)

    @property
    def diagnostics(self) -> Diagnostics:
        """log Z with its standard error, effective sample size and Pareto shape of each row."""

        def columns(chunk: _Chunk) -> Tensor:
            weights = chunk.log_weights
            independent = isinstance(chunk.nodes, WeightedPoints) and chunk.nodes.independent
            points = WeightedPoints(torch.zeros(len(weights), 1, 1, device=weights.device), weights, independent)
            return torch.stack(
                [chunk.log_partition, points.log_partition_stderr, points.effective_sample_size, pareto_k(weights)], -1
            )

        log_z, stderr, ess, k = self._gather(columns).unbind(-1)
        return Diagnostics(log_z, stderr, ess, k, self._num_points())

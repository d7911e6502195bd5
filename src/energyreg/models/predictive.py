"""The predictive distribution p(y|x): a torch distribution in user units, a thin face on energies and their nodes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from energyreg.checks import check_count, check_level
from energyreg.densities import ends
from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.spaces import TargetSpace
from energyreg.inference.diagnostics import Diagnostics, diagnose
from energyreg.inference.importance import AdaptiveImportanceSampling, ImportanceSampling
from energyreg.inference.integrators import AdaptiveQuadrature, StratifiedQuadrature
from energyreg.inference.modes import Modes, find_modes, highest, refine_in_user_units
from energyreg.inference.nodes import Nodes
from energyreg.inference.regions import intervals, threshold_at_level
from energyreg.inference.row_blocks import KEPT_FRACTION, NodeCache, RowBlock, Rows, refine_cells
from energyreg.modes import as_usual

__all__ = ["KEPT_FRACTION", "Diagnostics", "HighestDensityRegion", "Modes", "PredictiveDistribution", "Rows"]

Integrator: TypeAlias = AdaptiveQuadrature | StratifiedQuadrature | ImportanceSampling | AdaptiveImportanceSampling

COARSE = 1e-4
"""Spacing of floating-point numbers, relative to the targets' spread, above which rounding shows."""
BLOCK = 64
"""Rows whose samples come from one seed where the proposal cannot share points, so that blocks change nothing."""


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
        y = self.distribution.as_targets(y)
        return (self.distribution.log_prob(y) >= self.log_threshold) & self.distribution.space.contains(y)


class PredictiveDistribution(Distribution):
    """p(y|x) for B rows of x, in user units.

    In one dimension everything is deterministic: adaptive quadrature, and a cdf that is linear within its cells. In
    more, points come from the proposal (or, without one, from a grid) and the same seed gives the same result. Work is
    done in blocks of rows within a memory budget, which do not change the result. Nothing here carries a gradient,
    except `log_prob` and `prob` of a model in training mode.

    Made by calling a model. Long: it has a method for each question, and most of its lines are their contracts.

    Args:
        energy: Gives the energy function of some rows.
        num_rows: B.
        space: Target space.
        integrator: How points are made.
        differentiable: Whether `log_prob` carries a gradient.
        dtype: Of what is returned.
        device: Of what is returned.
        seed: Of the points, where they are random.
        memory_budget: Working memory in bytes that blocks are sized by.

    Attributes:
        energy: As given; so are space, integrator, differentiable, dtype, device, seed and memory_budget.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)
    has_rsample = False

    def __init__(
        self,
        energy: Callable[[Rows], Any],
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
        self.energy, self.space, self.integrator = energy, space, integrator
        self.differentiable, self.dtype, self.device = differentiable, dtype, torch.device(device)
        self.seed, self.memory_budget = seed, memory_budget
        self._cached: list[RowBlock] | None = None
        self._nodes = NodeCache(memory_budget)
        super().__init__(torch.Size([num_rows]), torch.Size([space.dim]), validate_args=False)

    def __getstate__(self) -> dict[str, Any]:
        """What makes this distribution, without the blocks of rows that it keeps for the next question."""
        return {**self.__dict__, "_cached": None, "_nodes": NodeCache(self.memory_budget)}

    def __repr__(self) -> str:
        """Shapes, space and integrator."""
        return (
            f"PredictiveDistribution(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}, "
            f"space={self.space}, integrator={self.integrator})"
        )

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors; points outside the target space have log-density -inf."""
        return constraints.real_vector

    @property
    def dim(self) -> int:
        """Target dimensions D."""
        return self.event_shape[0]

    @property
    def num_rows(self) -> int:
        """Rows B."""
        return self.batch_shape[0]

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of another distribution with the same dtype, device, seed and memory budget."""
        return {"dtype": self.dtype, "device": self.device, "seed": self.seed, "memory_budget": self.memory_budget}

    def with_energy(self, energy: Callable[[Rows], Any], num_rows: int | None = None) -> PredictiveDistribution:
        """The distribution of another energy in the same target space, by the same integrator and settings.

        Args:
            energy: Gives the energy of some rows.
            num_rows: Its rows; as many as here by default.
        """
        rows = self.num_rows if num_rows is None else num_rows
        return PredictiveDistribution(energy, rows, self.space, self.integrator, **self.settings)

    def select(self, rows: Any) -> PredictiveDistribution:
        """The distribution of some rows, which computes its own nodes.

        Args:
            rows: Their numbers, each at least -B and below B.
        """
        index = self.row_numbers(rows)
        return self.with_energy(partial(self._of_some, index), len(index))

    def _of_some(self, index: Tensor, rows: Rows) -> Any:
        return self.energy(index[rows])

    def row_numbers(self, rows: Any) -> Tensor:
        """Numbers of rows between 0 and B - 1, from numbers that may count from the end."""
        return torch.as_tensor(rows, dtype=torch.int64, device=self.device).remainder(self.num_rows)

    # Blocks of rows --------------------------------------------------------------------------------------------------

    def num_points(self) -> int:
        """Points per row."""
        return self.integrator.num_points(self.dim)

    def block_rows(self) -> int:
        """Rows per block, by the memory budget."""
        f = self.energy(slice(0, 1))
        count, shared = self.num_points(), isinstance(self.integrator, AdaptiveQuadrature | StratifiedQuadrature)
        if not shared and not isinstance(f.q, GaussianMixture):
            return BLOCK
        # Besides the energy itself: weights, masses and cumulative sums in double precision.
        floats = count * (f.floats_per_point(shared) + 16 + 4 * self.dim)
        size = max(self.memory_budget // (4 * floats), 1)
        return size if size < BLOCK else size // BLOCK * BLOCK

    def blocks(self) -> Iterable[RowBlock]:
        """The rows in blocks; kept for the next question where a single one holds all rows."""
        if self._cached is not None:
            return self._cached
        size = self.block_rows()
        slices = [slice(start, min(start + size, self.num_rows)) for start in range(0, self.num_rows, size)]
        if len(slices) == 1:
            self._cached = [self.block(slices[0])]
            return self._cached
        return map(self.block, slices)

    def block(self, rows: slice) -> RowBlock:
        """Some rows, with nodes that are kept or made when they are asked for."""
        f, kept = self.energy(rows), self._nodes.get(rows)

        def nodes() -> Nodes:
            if kept is not None:
                return kept
            made = self.integrate(f, rows)
            return made if self.differentiable else self._nodes.keep(rows, made)

        return RowBlock(rows, f, nodes, self.space, self.dtype, self.memory_budget)

    def integrate(self, f: Any, rows: slice) -> Nodes:
        """Nodes for the energy of some rows."""
        if isinstance(self.integrator, AdaptiveQuadrature):
            return refine_cells(self.integrator, self.energy, f, rows.start, self.memory_budget)
        if isinstance(self.integrator, StratifiedQuadrature):
            return replace(self.integrator, jitter=False)(f)
        # Points shared by all rows need one seed; others get one per block of rows.
        shared = isinstance(f.q, GaussianMixture)
        generator = torch.Generator().manual_seed(self.seed if shared else self.seed + rows.start)
        sampler = self.integrator
        if isinstance(sampler, ImportanceSampling):
            sampler = replace(sampler, quasi_random=shared)
        return sampler(f, f.q, generator=generator)

    @as_usual
    def gather(self, function: Callable[[RowBlock], Tensor], dim: int = 0) -> Tensor:
        """Apply a function to each block and join the results along their row dimension; without gradient."""
        with torch.no_grad():
            parts = [function(block) for block in self.blocks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    # Input -----------------------------------------------------------------------------------------------------------

    @as_usual
    def as_targets(self, y: Any, name: str = "y") -> Tensor:
        """Targets as a tensor of shape (*S, B, D) on this distribution's device.

        Raises:
            ValueError: If the shape does not broadcast to it; the message calls it by its name.
        """
        y = torch.as_tensor(y)
        y = y.to(self.device, y.dtype if y.is_floating_point() else self.dtype)
        if self.dim == 1 and y.ndim <= 1:
            y = y[..., None]
        if y.ndim < 1 or y.shape[-1] != self.dim or (y.ndim > 1 and y.shape[-2] not in (1, self.num_rows)):
            short = f", or ({self.num_rows},)" if self.dim == 1 else ""
            raise ValueError(
                f"{name} has shape {tuple(y.shape)}; expected (*S, {self.num_rows}, {self.dim}){short} for "
                f"{self.num_rows} rows of x and {self.dim} target dimension(s)."
            )
        if y.ndim == 1:
            y = y[None]
        return y.expand(*y.shape[:-2], self.num_rows, self.dim)

    def _as_levels(self, value: Any, name: str) -> Tensor:
        """Values per row that broadcast to (*S, B)."""
        value = torch.as_tensor(value)
        value = value.to(self.device, value.dtype if value.is_floating_point() else self.dtype)
        try:
            return value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        except RuntimeError:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, which does not broadcast to (*S, {self.num_rows}) for "
                f"{self.num_rows} rows."
            ) from None

    def _one_dimensional(self, what: str) -> None:
        if self.dim != 1:
            raise NotImplementedError(f"{what} is for one target dimension; this target has {self.dim}.")

    def _in_user_units(self, values: Tensor) -> Tensor:
        """Values in user units in this distribution's dtype; a warning where that has no room for them."""
        step, unit = ends.spacing(self.space, self.dtype), ends.unit(self.space)
        coarse = (step > COARSE * unit).nonzero()[:, 0].tolist()
        if coarse:
            d = coarse[0]
            warnings.warn(
                f"{self.dtype} cannot tell targets apart that are closer than {float(step[d]):.2g}, but output {d} of "
                f"{self.space} varies by {float(unit[d]):.2g} far from 0: what is returned is rounded to that. Call "
                "model.double(), or subtract a constant from the targets.",
                stacklevel=3,
            )
        return values.to(self.dtype)

    # Density ---------------------------------------------------------------------------------------------------------

    def log_prob(self, value: Any) -> Tensor:
        """Log-density in nats and user units.

        Args:
            value: Targets in user units, shape (*S, B, D), or (B,) for D = 1.

        Returns:
            Shape (*S, B); -inf outside the target space, NaN for NaN. Within a millionth of an interval's width from
            its ends, the probability of that margin, spread evenly over it.

        Raises:
            ValueError: If the shape is another.
        """
        y = self.as_targets(value)
        if self.differentiable and torch.is_grad_enabled():
            return self.block(slice(0, self.num_rows)).log_prob(y)
        return self.gather(lambda block: block.log_prob(y[..., block.rows, :]), -1)

    def prob(self, value: Any) -> Tensor:
        """Density in user units, shape (*S, B); see `log_prob`."""
        return self.log_prob(value).exp()

    # One dimension: the cdf and its inverse --------------------------------------------------------------------------

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
        y = self.as_targets(value)[..., 0]
        flat = y.reshape(-1, self.num_rows)
        return self.gather(lambda block: block.cdf(flat[:, block.rows]), -1).reshape(y.shape).to(self.dtype)

    @as_usual
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
        flat = level.reshape(-1, self.num_rows)
        return self._in_user_units(self.gather(lambda block: block.icdf(flat[:, block.rows]), -1).reshape(level.shape))

    @as_usual
    def quantile(self, level: Any) -> Tensor:
        """Quantiles for D = 1.

        Args:
            level: Probability, or several, shape (L,).

        Returns:
            Targets in user units, shape (B,), or (L, B). Within the resolution of an end of an interval, that end.

        Raises:
            NotImplementedError: If D > 1; see `interval`.
        """
        level = torch.as_tensor(level, dtype=torch.double)
        y = self.icdf(level[..., None].expand(*level.shape, self.num_rows))
        return self._in_user_units(ends.snap(self.space, y[..., None])[..., 0])

    # Summaries -------------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """Mean in user units, shape (B, D); on a circle the direction of the mean vector."""
        return self._in_user_units(self.gather(RowBlock.mean))

    @property
    def variance(self) -> Tensor:
        """Variance in squared user units, shape (B, D); on a circle that of the arc to the mean."""
        return self.gather(RowBlock.variance).to(self.dtype)

    def entropy(self) -> Tensor:
        r"""Differential entropy, the expected -log p(y|x), in nats of user units, shape (B,).

        .. math:: H = -\int p(y|x) \log p(y|x) dy

        For D ≤ 2 by quadrature where the points are one; from the proposal's samples it is a self-normalised estimate,
        whose error falls as one over the root of the effective sample size (see `diagnostics`).
        """
        return self.gather(lambda block: block.entropy()).to(self.dtype)

    @property
    def median(self) -> Tensor:
        """Median of each dimension, shape (B, D); on a circle counted from opposite the mean."""
        return self.central_quantiles([0.5])[0]

    def interval(self, level: float = 0.9) -> Tensor:
        """Equal-tailed interval of each dimension's marginal.

        Args:
            level: Probability of the interval.

        Returns:
            Lower and upper end in user units, shape (B, 2) for D = 1, else (B, D, 2). On a circle the arc from the
            lower to the upper end, cut opposite the mean; its upper end may lie beyond the range. An end within the
            resolution of an end of the space is that end.

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        check_level(level)
        ends = self.central_quantiles([(1 - level) / 2, (1 + level) / 2])
        both = torch.stack([ends[0], ends[1]], -1)
        return both.squeeze(1) if self.dim == 1 else both

    def central_quantiles(self, levels: Sequence[float]) -> Tensor:
        """Quantiles of each dimension in user units, (L,) to (L, B, D); of an angle counted from opposite the mean."""
        probabilities = torch.tensor(levels, dtype=torch.double, device=self.device)
        return self._in_user_units(self.gather(lambda block: block.central_quantiles(probabilities), 1))

    @as_usual
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
        uniforms = torch.rand((count, self.num_rows), generator=generator, dtype=torch.double).to(self.device)
        grid = self.integrator if isinstance(self.integrator, StratifiedQuadrature) else None
        offsets = None
        if grid is not None:
            offsets = torch.rand((count, self.num_rows, self.dim), generator=generator).to(self.device)

        def draw(block: RowBlock) -> Tensor:
            level = uniforms[:, block.rows]
            if grid is None or offsets is None:
                return self.space.to_user(block.nodes.draw(level))
            index = block.points.indices_at(level)
            return self.space.to_user(grid.within_cells(block.f, index, offsets[:, block.rows], self.dtype))

        return self._in_user_units(self.gather(draw, 1)).reshape(*shape, self.num_rows, self.dim)

    # Modes and regions -----------------------------------------------------------------------------------------------

    def refine(
        self,
        initial: Any,
        *,
        num_steps: int = 10,
        step_size: float | Sequence[float] | Tensor | None = None,
        decay: float = 0.5,
    ) -> Tensor:
        r"""Improve initial estimates by gradient ascent on the density, as papers I to III predict.

        The ascent is on the log-density in user units, so that a mode means what the user sees and
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
        y = self.as_targets(initial, "initial")
        y = y.to(torch.promote_types(y.dtype, self.dtype))
        self._check_estimates(y)
        step = None if step_size is None else torch.as_tensor(step_size)
        if step is not None and (step.ndim > 1 or (step.ndim and len(step) != self.dim)):
            found = f"length {len(step)}" if step.ndim == 1 else f"shape {tuple(step.shape)}"
            raise ValueError(f"step_size has {found}; expected one number, or {self.dim}, one per target dimension.")
        flat = y.reshape(-1, self.num_rows, self.dim)
        refined = self.gather(lambda block: refine_in_user_units(block, flat[:, block.rows], step, num_steps, decay), 1)
        return refined.reshape(y.shape)

    def _check_estimates(self, y: Tensor) -> None:
        outside = ~self.space.contains(y)
        if outside.any():
            first = outside.nonzero()[0].tolist()
            raise ValueError(
                f"initial has {int(outside.sum())} of {outside.numel()} rows that are not finite or lie outside "
                f"{self.space!r}, the first at index {tuple(first)}: {y[tuple(first)].tolist()}; drop these rows, or "
                f"move them inside."
            )

    @property
    def mode(self) -> Tensor:
        """Highest mode of the density in user units, shape (B, D): the best point, refined on f; see `modes`."""
        return self._in_user_units(self.gather(highest))

    @as_usual
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
        check_count("num_starts", num_starts)
        check_count("num_steps", num_steps, 0)
        parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        with torch.no_grad():
            for block in self.blocks():
                found = find_modes(
                    block, self.seed, num_starts, num_steps,
                    tolerance=tolerance, min_prominence=min_prominence, min_probability=min_probability,
                )  # fmt: skip
                for part, rows in zip(parts, found, strict=True):
                    part.extend(rows)
        return Modes(*parts)

    def highest_density_region(self, level: float = 0.9) -> HighestDensityRegion:
        """The smallest region in user units with the given probability.

        Args:
            level: Probability of the region.

        Returns:
            For D = 1 with a union of intervals per row; for D > 1 as a threshold on the density.

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        check_level(level)

        def threshold(block: RowBlock, density: Tensor) -> tuple[Tensor, Tensor]:
            limit = threshold_at_level(block, density, level)
            return limit - block.log_partition, limit

        return self.region(level, threshold)

    def region(
        self, level: float, threshold: Callable[[RowBlock, Tensor], tuple[Tensor, Tensor]]
    ) -> HighestDensityRegion:
        """The region above a threshold on the density, for D = 1 with a union of intervals per row.

        Args:
            level: What the region says of itself.
            threshold: (block, log-density at its nodes up to log Z, (M, B)) to the threshold on log p and the same up
                to log Z, for the intervals, shape (B,) both.
        """
        thresholds: list[Tensor] = []
        lines: list[Tensor] = []
        with torch.no_grad():
            for block in self.blocks():
                density = block.point_density()
                log_threshold, limit = threshold(block, density)
                thresholds.append(log_threshold)
                if block.is_line:
                    lines += intervals(block, density, limit)
        return HighestDensityRegion(level, torch.cat(thresholds), lines or None, self)

    # Trust -----------------------------------------------------------------------------------------------------------

    @property
    def log_partition(self) -> Tensor:
        """Log Z in model space, shape (B,); exactly 0 where the energy is a log-density."""
        return self.gather(lambda block: block.log_partition)

    @property
    def diagnostics(self) -> Diagnostics:
        """log Z with its standard error, effective sample size and Pareto shape of each row."""
        log_z, stderr, ess, k = self.gather(diagnose).unbind(-1)
        return Diagnostics(log_z, stderr, ess, k, self.num_points())

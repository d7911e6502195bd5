"""Noise around the observed target, q(y|y_i), for training only: what paper I to III contrast the target with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from energyreg.checks import check_count
from energyreg.densities.angles import wrap_angles
from energyreg.densities.mixtures import GaussianMixture, log_sum_exp
from energyreg.densities.spaces import TargetSpace

__all__ = ["GaussianNoise"]


def _as_scales(scales: object, name: str = "scales") -> tuple[tuple[float, ...], ...]:
    """Scales as K tuples of one number, or of D."""
    try:
        array = np.asarray(scales, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {scales!r}; expected K numbers, or K sequences of D numbers each.") from None
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            f"{name} has shape {array.shape}; expected (K,), or (K, D) for own scales of each target dimension."
        )
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"{name} is {array.tolist()}; expected finite numbers > 0.")
    return tuple(tuple(row) for row in array.reshape(len(array), -1).tolist())


@dataclass(frozen=True)
class GaussianNoise:
    r"""K Gaussians of different scales around the target, in model space.

    .. math:: q(y | y_i) = \frac1K \sum_k N(y; y_i, \mathrm{diag}(\sigma_k^2))

    Model space standardises real targets, so there a scale is relative to the spread of the training targets;
    :meth:`in_user_units` takes absolute ones, :meth:`for_targets` proposes scales from the training targets. Samples
    are drawn for each example by itself; with any of the options below each single sample still has the density q.

    Args:
        scales: Standard deviations: K numbers, or K sequences of D, one per target dimension.
        periodic: Whether each dimension is an angle in [-π, π), where the Gaussians are wrapped; none by default.
        stratified: Spread the samples evenly over the components in place of drawing a component for each.
        antithetic: Let the second half of the samples mirror the first at the target.
        quasi_random: Use scrambled Sobol points, moved by a random shift in each row, in place of independent ones.

    Raises:
        ValueError: If a scale is not a finite number > 0, their shape is another, or periodic has another length.

    Source:
        Gustafsson et al., ECCV 2020 and BMVC 2020, whose code draws one set of offsets for a whole mini-batch; own
        offsets for each example have the same mean and a smaller variance.

    >>> noise = GaussianNoise([0.1, 1.0])
    >>> y = torch.zeros(5, 1)
    >>> points = noise.sample(y, 64)
    >>> points.shape, noise.log_prob(points, y).shape
    (torch.Size([64, 5, 1]), torch.Size([64, 5]))
    """

    scales: Sequence[float] | Sequence[Sequence[float]]
    periodic: Sequence[bool] | None = None
    stratified: bool = True
    antithetic: bool = False
    quasi_random: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        scales = _as_scales(self.scales)
        object.__setattr__(self, "scales", scales)
        if self.periodic is not None:
            flags = tuple(bool(flag) for flag in self.periodic)
            if len(scales[0]) not in (1, len(flags)):
                raise ValueError(
                    f"scales has {len(scales[0])} numbers per component, but periodic has {len(flags)}; expected one "
                    "of each per target dimension."
                )
            object.__setattr__(self, "periodic", flags)

    @classmethod
    def for_targets(
        cls,
        y: Tensor,
        num_components: int = 3,
        *,
        smallest: float = 0.1,
        largest: float = 1.5,
        periodic: Sequence[bool] | None = None,
    ) -> GaussianNoise:
        """Noise with scales proposed from the training targets, so that nothing must be tuned to start.

        The scales form a geometric ladder from a small part of the targets' spread, to resolve the density, to more
        than the spread, to reach every place where a target may be. Each dimension has its own.

        Args:
            y: Training targets in model space, shape (N, D).
            num_components: Gaussians K.
            smallest: Smallest scale, relative to the standard deviation of the targets.
            largest: Largest scale, relative to the same.
            periodic: Whether each dimension is an angle; none by default.

        Raises:
            ValueError: If y has fewer than two rows or a constant or non-finite column, num_components < 1, or not
                0 < smallest ≤ largest.
        """
        if isinstance(num_components, bool) or not isinstance(num_components, (int, np.integer)) or num_components < 1:
            raise ValueError(f"num_components is {num_components!r}; expected a whole number of at least 1.")
        if not 0 < smallest <= largest < math.inf:
            raise ValueError(f"smallest is {smallest} and largest {largest}; expected 0 < smallest ≤ largest.")
        spread = _spread(y, periodic)
        if num_components == 1:
            factors = [math.sqrt(smallest * largest)]
        else:
            ratio = (largest / smallest) ** (1 / (num_components - 1))
            factors = [smallest * ratio**k for k in range(num_components)]
        return cls([[factor * s for s in spread] for factor in factors], periodic)

    @classmethod
    def relative(
        cls, scales: Sequence[float] | Sequence[Sequence[float]], y: Tensor, periodic: Sequence[bool] | None = None
    ) -> GaussianNoise:
        """Noise with scales relative to the standard deviation of the targets in each dimension.

        Args:
            scales: K numbers, or K sequences of D.
            y: Training targets, shape (N, D), in the space where the noise will be used.
            periodic: Whether each dimension is an angle; none by default.

        Raises:
            ValueError: If the scales are not > 0 or of another length than D, or y is constant or not finite.
        """
        rows, spread = _as_scales(scales), _spread(y, periodic)
        if len(rows[0]) not in (1, len(spread)):
            raise ValueError(f"scales has {len(rows[0])} numbers per component; y has {len(spread)} dimensions.")
        rows = tuple(row * len(spread) if len(row) == 1 else row for row in rows)
        return cls([[r * s for r, s in zip(row, spread, strict=True)] for row in rows], periodic)

    @classmethod
    def in_user_units(cls, scales: Sequence[float] | Sequence[Sequence[float]], space: TargetSpace) -> GaussianNoise:
        """Noise with absolute scales: in the units of the targets, where the target space is linear.

        Args:
            scales: K numbers, or K sequences of D, in user units.
            space: A fitted target space whose dimensions are real or angles.

        Raises:
            ValueError: If the space is not fitted, or bends a dimension (positive or bounded targets), where no scale
                in user units is the same everywhere.
        """
        if not bool(space.fitted):
            raise ValueError("space is not fitted; call its fit, or the model's fit_preprocessing, first.")
        # The slope of the map to model space at two places: where it is linear, they agree.
        ends = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.double).expand(-1, space.dim)
        y = space.to_user(ends)
        slope = torch.stack([_slopes(space, row) for row in y])
        if not torch.allclose(slope, slope[:1].expand_as(slope), rtol=1e-6):
            raise ValueError(
                f"space is {space}, which bends at least one dimension, so that a scale in user units is not one in "
                "model space; give scales in model space, or use for_targets."
            )
        rows = _as_scales(scales)
        if len(rows[0]) not in (1, space.dim):
            raise ValueError(f"scales has {len(rows[0])} numbers per component; the space has {space.dim} dimensions.")
        rows = tuple(row * space.dim if len(row) == 1 else row for row in rows)
        periodic = space.periodic if any(space.periodic) else None
        return cls([[r * s for r, s in zip(row, slope[0].tolist(), strict=True)] for row in rows], periodic)

    @property
    def num_components(self) -> int:
        """Gaussians K."""
        return len(self.scales)

    def _table(self, y: Tensor) -> Tensor:
        """Scales of shape (K, D) for targets (*S, D)."""
        scales = torch.tensor(self.scales, dtype=y.dtype, device=y.device)
        dim = y.shape[-1]
        if scales.shape[1] not in (1, dim):
            raise ValueError(
                f"scales has {scales.shape[1]} numbers per component, but y has {dim} dimensions; expected 1 or {dim}."
            )
        if self.periodic is not None and len(self.periodic) != dim:
            raise ValueError(f"periodic has {len(self.periodic)} entries, but y has {dim} dimensions.")
        return scales.expand(-1, dim)

    def __call__(self, y: Tensor) -> GaussianMixture:
        """Return q(·|y) as a distribution with batch shape (B,), for targets of shape (B, D)."""
        scales = self._table(y)
        shape = (len(y), *scales.shape)
        logits = torch.zeros(shape[:2], dtype=y.dtype, device=y.device)
        return GaussianMixture(logits, y[:, None].expand(shape), scales.expand(shape), periodic=self.periodic)

    def log_prob(self, points: Tensor, y: Tensor) -> Tensor:
        """Log-density of points around their targets, in nats.

        Args:
            points: Shape (*S, B, D).
            y: Targets, shape (B, D).

        Returns:
            log q(points | y), shape (*S, B).
        """
        if self.periodic is not None and any(self.periodic):
            return self(y).log_prob(points)
        scales = self._table(y)
        # All components have one centre, so the squared differences are taken once.
        squared = (points - y).square()
        precision = -0.5 * scales.square().reciprocal()
        constant = scales.log().sum(-1) + 0.5 * y.shape[-1] * math.log(2 * math.pi) + math.log(len(scales))
        if y.shape[-1] == 1:
            exponents = [squared[..., 0] * p for p in precision[:, 0]]
        else:
            # Never in half precision, which autocast would take: it has no room for 1 / 0.003².
            with torch.autocast(squared.device.type, enabled=False):
                exponents = list((squared @ precision.T).unbind(-1))
        return log_sum_exp([exponent - c for exponent, c in zip(exponents, constant, strict=True)])

    @torch.no_grad()
    def sample(self, y: Tensor, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw samples around each target.

        Args:
            y: Targets, shape (B, D).
            num_samples: Samples M per target.
            generator: Source of randomness; torch's global one by default.

        Returns:
            Samples without gradient, shape (M, B, D).

        Raises:
            ValueError: If num_samples is not a whole number ≥ 1, or the scales do not suit D.
        """
        check_count("num_samples", num_samples)
        scales = self._table(y)
        count = (num_samples + 1) // 2 if self.antithetic else int(num_samples)
        choice, normal = self._numbers(count, y, generator)
        component = (choice * len(scales)).long().clamp_max(len(scales) - 1)
        offset = scales.index_select(0, component.flatten()).view_as(normal) * normal
        if self.antithetic:
            offset = torch.cat([offset, -offset[: num_samples - count]])
        points = y + offset
        if self.periodic is not None and any(self.periodic):
            angle = torch.tensor(self.periodic, device=y.device)
            points = wrap_angles(points, angle)
        return points

    def _numbers(self, count: int, y: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Uniform numbers for the components, (M, B), and standard normal ones for the offsets, (M, B, D)."""
        rows, dim = y.shape
        # On the generator's own device, so that a CPU generator serves targets on a GPU.
        source = generator.device if generator is not None else y.device

        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=y.dtype, device=source).to(y.device)

        if self.quasi_random:
            seed = int(torch.randint(2**31, (), generator=generator, device=source))
            sobol = torch.quasirandom.SobolEngine(1 + dim, scramble=True, seed=seed)
            points = sobol.draw(count, dtype=y.dtype).to(y.device)[:, None]
            # The shift makes the points of each row uniform by themselves and independent of the other rows'.
            points = (points + rand(rows, 1 + dim)).remainder(1)
            tiny = 1e-7
            return points[..., 0], torch.special.ndtri(points[..., 1:].clamp(tiny, 1 - tiny))
        choice = rand(count, rows)
        if self.stratified:
            strata = torch.arange(count, dtype=y.dtype, device=y.device)[:, None]
            # Turned by a random number in each row, so that no sample is bound to a component by its place.
            choice = ((strata + choice) / count + rand(rows)).remainder(1)
        normal = torch.randn((count, rows, dim), generator=generator, dtype=y.dtype, device=source).to(y.device)
        return choice, normal


def _spread(y: Tensor, periodic: Sequence[bool] | None) -> list[float]:
    """Standard deviation of each dimension; for an angle that of the wrapped Gaussian with the same mean vector."""
    y = torch.as_tensor(y).detach().double()
    if y.ndim != 2 or len(y) < 2:
        raise ValueError(f"y has shape {tuple(y.shape)}; expected (N, D) with at least two rows.")
    if not bool(y.isfinite().all()):
        raise ValueError("y holds values that are not finite.")
    spread = y.std(0)
    if periodic is not None:
        if len(periodic) != y.shape[1]:
            raise ValueError(f"periodic has {len(periodic)} entries, but y has {y.shape[1]} dimensions.")
        length = torch.hypot(y.sin().mean(0), y.cos().mean(0)).clamp(1e-12, 1)
        circular = (-2 * length.log()).sqrt().clamp_max(math.pi / math.sqrt(3))  # the uniform's
        spread = torch.where(torch.tensor(list(periodic), device=y.device), circular, spread)
    constant = (spread <= 0).nonzero()[:, 0].tolist()
    if constant:
        raise ValueError(f"y is constant in dimension(s) {constant}; there is no spread that scales could follow.")
    return spread.tolist()


def _slopes(space: TargetSpace, y: Tensor) -> Tensor:
    """Derivative of the map to model space in each dimension at a point in user units, shape (D,)."""
    with torch.enable_grad():
        leaf = y[None].detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(space.to_model(leaf).sum(), leaf)
    return gradient[0]

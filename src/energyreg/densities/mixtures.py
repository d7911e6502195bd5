"""Mixtures of Gaussians, wrapped around the circle where a dimension is an angle, and draws from any distribution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from energyreg.densities.angles import wrap_angles
from energyreg.randomness import RandomSource

__all__ = ["GaussianMixture", "MixtureReference", "Wrapped", "draw", "log_sum_exp"]


TURNS = 3
"""Turns on either side that a wrapped density sums over: enough for scales up to WIDEST."""


BLOCK = 2**16
"""Values of one component that are computed at once where no gradient is wanted: a quarter of a megabyte."""


MANY = 16_384
"""Values from which on a density is computed component by component."""


NOTHING = -60.0
"""Log of a share of a density that is too small to count."""


WIDEST = 5.0
"""Largest scale of a wrapped Gaussian, in radians."""


MOST_STEPS = 100
"""Steps of the search for a quantile at most: of bisection alone, 60 are exact."""


def log_sum_exp(parts: Sequence[Tensor], overwrite: bool = False) -> Tensor:
    """log Σ exp of a few large tensors of one shape, two to three times as fast as stacking them for `logsumexp`.

    Args:
        parts: The tensors.
        overwrite: Whether they may be used as working memory; not where a gradient is wanted.
    """
    with torch.no_grad():
        top = parts[0].detach().clone()
        for part in parts[1:]:
            torch.maximum(top, part, out=top)
        top.clamp_min_(torch.finfo(top.dtype).min)  # all -inf at an infinite value
    # What is cut off is no part of the sum even in double precision; below it numbers are denormal, and slow.
    if overwrite:
        first, *others = (part.sub_(top).clamp_min_(NOTHING).exp_() for part in parts)
        for other in others:
            first += other
        return first.log_().add_(top)
    total = sum((part - top).clamp_min(NOTHING).exp() for part in parts)
    assert isinstance(total, Tensor)
    return top + total.log()


def draw(q: Distribution, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
    """Independent samples of any distribution from a generator of the caller's, without gradient.

    Args:
        q: Batch shape (B,), event shape (D,).
        num_samples: Samples M.
        generator: Source of randomness; torch's global one by default.

    Returns:
        Samples, shape (M, B, D).
    """
    if isinstance(q, GaussianMixture):
        return q.sample((num_samples,), generator=generator)
    if generator is None:
        return q.sample(torch.Size([num_samples])).detach()
    # torch distributions know no generator: what they draw from is seeded from ours.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with RandomSource(seed).everywhere():
        return q.sample(torch.Size([num_samples])).detach()


class GaussianMixture(Distribution):
    r"""A batch of mixtures of Gaussians in D dimensions, with diagonal or low-rank plus diagonal covariances.

    .. math:: q(y) = \sum_k \pi_k N(y; \mu_k, \mathrm{diag}(\sigma_k^2) + L_k L_k^T)

    Periodic dimensions, angles in [-π, π), use wrapped Gaussians.

    Args:
        logits: Unnormalised log-weights, shape (B, K).
        means: Component means, shape (B, K, D).
        scales: Component standard deviations (of the diagonal part), shape (B, K, D).
        factor: Low-rank factors L, shape (B, K, D, R), or None.
        periodic: Whether each dimension is an angle; none by default.

    Raises:
        ValueError: If shapes disagree, or a low-rank covariance meets a periodic dimension.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)
    has_rsample = False

    def __init__(
        self,
        logits: Tensor,
        means: Tensor,
        scales: Tensor,
        factor: Tensor | None = None,
        periodic: Sequence[bool] | None = None,
    ) -> None:
        if means.shape != scales.shape or means.shape[:-1] != logits.shape:
            raise ValueError(
                f"logits, means and scales have shapes {tuple(logits.shape)}, {tuple(means.shape)} and "
                f"{tuple(scales.shape)}; "
                "expected (B, K), (B, K, D) and (B, K, D)."
            )
        self.log_mixing = logits.log_softmax(-1)
        self.periodic = (False,) * means.shape[-1] if periodic is None else tuple(periodic)
        if any(self.periodic):
            # The sum over turns reaches TURNS from [-π, π): means are brought there, and a scale of 5 is uniform to
            # 1e-5 already.
            angle = torch.tensor(self.periodic, device=means.device)
            means = wrap_angles(means, angle)
            scales = torch.where(angle, scales.clamp_max(WIDEST), scales)
        self.means, self.scales, self.factor = means, scales, factor
        if factor is not None and any(self.periodic):
            raise ValueError("factor is given, but a dimension is periodic: low-rank covariances need real dimensions.")
        super().__init__(logits.shape[:-1], means.shape[-1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Real vectors."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> GaussianMixture:
        """Return the mixture with a larger batch shape."""
        shape = torch.Size(batch_shape)
        k, d = self.means.shape[-2:]
        factor = None if self.factor is None else self.factor.expand(*shape, *self.factor.shape[-3:])
        means, scales = self.means.expand(*shape, k, d), self.scales.expand(*shape, k, d)
        return GaussianMixture(self.log_mixing.expand(*shape, k), means, scales, factor, self.periodic)

    def __getitem__(self, rows: Tensor | slice) -> GaussianMixture:
        """The mixtures of some rows."""
        factor = None if self.factor is None else self.factor[rows]
        return GaussianMixture(self.log_mixing[rows], self.means[rows], self.scales[rows], factor, self.periodic)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, (*S, B, D) or (*S, 1, D) to (*S, B)."""
        simple = value.shape[-1] == 1 and self.factor is None and not any(self.periodic)
        # A compiled or exported graph serves any number of rows, so it cannot choose by that.
        simple = simple and not torch.compiler.is_compiling()
        if simple and torch.broadcast_shapes(value.shape[:-1], self.batch_shape).numel() >= MANY:
            return self._log_prob_of_many(value[..., 0])
        return self._component_log_prob(value).add(self.log_mixing).logsumexp(-1)

    def _log_prob_of_many(self, value: Tensor) -> Tensor:
        """The same for D = 1, component by component: a sum over a short last dimension is two or three times slower.

        Args:
            value: Shape (*S, B) or (*S, 1).
        """
        scales = self.scales[..., 0]
        constant = self.log_mixing - scales.log() - 0.5 * math.log(2 * math.pi)
        slope = scales.reciprocal() * math.sqrt(0.5)
        centres = self.means[..., 0] * slope
        columns = list(zip(constant.unbind(-1), centres.unbind(-1), slope.unbind(-1), strict=True))
        if any(t.requires_grad for t in (value, constant, centres, slope)) and torch.is_grad_enabled():
            return log_sum_exp([c - torch.addcmul(-m, value, s).square() for c, m, s in columns])
        # Without a gradient nothing is kept: values are overwritten, and those of a few rows stay in the cache.
        result = value.new_empty(torch.broadcast_shapes(value.shape, self.batch_shape))
        count = result.shape[-1]
        step = max(BLOCK * count // max(result.numel(), 1), 1)
        for start in range(0, count, step):
            rows = slice(start, start + step)
            y = value if value.shape[-1] == 1 else value[..., rows]
            parts = [
                torch.addcmul(-m[..., rows], y, s[..., rows]).square_().neg_().add_(c[..., rows]) for c, m, s in columns
            ]
            result[..., rows] = log_sum_exp(parts, overwrite=True)
        return result

    def _component_log_prob(self, value: Tensor) -> Tensor:
        difference = value[..., None, :] - self.means
        if self.factor is not None:
            # The squared distance as min over c of |t - W c|² + |c|²: no large numbers cancel, unlike in Woodbury's
            # formula, which loses whole nats in single precision where scales are small beside the factor.
            t, w = difference / self.scales, self.factor / self.scales[..., None]
            capacitance = w.mT @ w + torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
            root = torch.linalg.cholesky(capacitance)
            c = torch.cholesky_solve((w.mT @ t[..., None]), root.expand(*t.shape[:-1], *root.shape[-2:]))
            squared = (t - (w @ c)[..., 0]).square().sum(-1) + c[..., 0].square().sum(-1)
            log_det = self.scales.log().sum(-1) + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            return -0.5 * squared - log_det - 0.5 * self.means.shape[-1] * math.log(2 * math.pi)
        if not any(self.periodic):
            # The squared distance is all that depends on y; the rest is added once per component.
            constant = self.scales.log().sum(-1) + 0.5 * self.means.shape[-1] * math.log(2 * math.pi)
            scaled = difference / self.scales
            squared = scaled[..., 0].square() if scaled.shape[-1] == 1 else scaled.square().sum(-1)
            return -0.5 * squared - constant
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for d, angle in enumerate(self.periodic):
            shift, scale = difference[..., d], self.scales[..., d]
            if angle:
                turns = 2 * math.pi * torch.arange(-TURNS, TURNS + 1, device=value.device, dtype=value.dtype)
                exponent = (-0.5 * ((shift[..., None] + turns) / scale[..., None]).square()).logsumexp(-1)
            else:
                exponent = -0.5 * (shift / scale).square()
            total = total + exponent - scale.log() - 0.5 * math.log(2 * math.pi)
        return total

    @property
    def num_uniforms(self) -> int:
        """Uniform numbers that one sample takes: one for the component, one for each Gaussian."""
        return 1 + self.event_shape[0] + (0 if self.factor is None else self.factor.shape[-1])

    def _assemble(self, choice: Tensor, noise: Tensor) -> Tensor:
        """Samples from a uniform number for the component, (*S, B), and standard normal ones, (*S, B, D + R)."""
        lead = choice.shape[: choice.ndim - 1]
        cumulative = self.log_mixing.exp().cumsum(-1)  # (B, K)
        scaled = choice * cumulative[..., -1]
        component = torch.zeros(choice.shape, dtype=torch.long, device=choice.device)
        for border in cumulative[..., :-1].unbind(-1):  # a sum over a short last dimension is several times slower
            component += scaled >= border
        d = self.event_shape[0]
        index = component[..., None, None].expand(*component.shape, 1, d)
        means = self.means.expand(*lead, *self.means.shape).gather(-2, index)[..., 0, :]
        scales = self.scales.expand(*lead, *self.scales.shape).gather(-2, index)[..., 0, :]
        y = means + scales * noise[..., :d]
        if self.factor is not None:
            rank = self.factor.shape[-1]
            index = component[..., None, None, None].expand(*component.shape, 1, d, rank)
            factor = self.factor.expand(*lead, *self.factor.shape).gather(-3, index)[..., 0, :, :]
            y = y + (factor @ noise[..., d:, None])[..., 0]
        if any(self.periodic):
            angle = torch.tensor(self.periodic, device=y.device)
            y = wrap_angles(y, angle)
        return y

    @torch.no_grad()
    def sample(
        self,
        sample_shape: Any = (),
        *,
        generator: torch.Generator | None = None,
        stratified: bool = False,
    ) -> Tensor:
        """Draw samples.

        Args:
            sample_shape: Leading shape S.
            generator: Source of randomness; torch's global one by default.
            stratified: Spread the choice of component evenly over the first sample dimension, which lowers the variance
                of means over it and leaves every single sample's distribution as it is.

        Returns:
            Samples, shape (*S, B, D).
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        options: dict[str, Any] = {"dtype": self.means.dtype, "device": self.means.device}
        choice = torch.rand(shape, generator=generator, **options)
        if stratified and len(sample_shape):
            strata = torch.arange(shape[0], **options).reshape(-1, *(1,) * (len(shape) - 1))
            # Turned by a random number, so that the first sample is not always of the first component.
            turn = torch.rand(shape[1:], generator=generator, **options)
            choice = ((strata + choice) / shape[0] + turn).remainder(1)
        noise = torch.randn((*shape, self.num_uniforms - 1), generator=generator, **options)
        return self._assemble(choice, noise)

    @torch.no_grad()
    def from_uniforms(self, uniforms: Tensor) -> Tensor:
        """Samples as a function of points in the unit cube, for quasi-random integration.

        Args:
            uniforms: Points strictly inside (0, 1), shape (M, num_uniforms), shared by all rows.

        Returns:
            Samples, shape (M, B, D).
        """
        noise = torch.special.ndtri(uniforms[:, 1:])
        lead = (len(uniforms), *self.batch_shape)
        columns = (1,) * len(self.batch_shape)
        return self._assemble(
            uniforms[:, :1].reshape(-1, *columns).expand(lead),
            noise.reshape(len(noise), *columns, -1).expand(*lead, -1),
        )

    @property
    def mean(self) -> Tensor:
        """Mean, shape (B, D); for a periodic dimension the circular mean."""
        weights = self.log_mixing.exp()[..., None]
        linear = (weights * self.means).sum(-2)
        if not any(self.periodic):
            return linear
        length = weights * (-0.5 * self.scales.square()).exp()
        circular = torch.atan2((length * self.means.sin()).sum(-2), (length * self.means.cos()).sum(-2))
        return torch.where(torch.tensor(self.periodic, device=linear.device), circular, linear)

    @property
    def variance(self) -> Tensor:
        """Variance of each dimension, shape (B, D).

        Raises:
            NotImplementedError: If a dimension is periodic; take it from the model's predictive distribution.
        """
        if any(self.periodic):
            raise NotImplementedError("The variance of a wrapped mixture has no closed form; use model(x).variance.")
        weights = self.log_mixing.exp()[..., None]
        second = self.scales.square() + (self.means - self.mean[..., None, :]).square()
        if self.factor is not None:
            second = second + self.factor.square().sum(-1)
        return (weights * second).sum(-2)

    def cdf(self, value: Tensor) -> Tensor:
        """Cumulative distribution function for D = 1, from -π on for an angle, (*S, B, 1) or (*S, 1, 1) to (*S, B).

        Raises:
            NotImplementedError: If D > 1.
        """
        if self.event_shape != (1,):
            raise NotImplementedError(f"The cdf is for one dimension; this mixture has {self.event_shape[0]}.")
        means, scales = self.means[..., 0], self.scales[..., 0]
        if not self.periodic[0]:
            components = torch.special.ndtr((value - means) / scales)
        else:
            components = torch.zeros((), dtype=value.dtype, device=value.device)
            for turn in range(-TURNS, TURNS + 1):
                shift = 2 * math.pi * turn - means
                components = components + torch.special.ndtr((value + shift) / scales)
                components = components - torch.special.ndtr((shift - math.pi) / scales)
        return (self.log_mixing.exp() * components).sum(-1)

    @torch.no_grad()
    def icdf(self, level: Tensor) -> Tensor:
        """Quantiles for D = 1, (*S, B, 1) or (*S, 1, 1) to (*S, B, 1), in double precision, without gradient.

        Newton's method on the cdf in double precision; where it leaves the bracket, the bracket is halved. A quantile
        of a mixture lies between those of its components.

        Args:
            level: Probabilities; 0 and 1 count as the numbers next to them.

        Raises:
            NotImplementedError: If D > 1.
        """
        q = GaussianMixture(self.log_mixing.double(), self.means.double(), self.scales.double(), periodic=self.periodic)
        tiny, eps = torch.finfo(torch.double).tiny, torch.finfo(torch.double).eps
        level = level.double().clamp(tiny, 1 - eps / 2)
        if self.periodic[0]:
            low = torch.full_like(level, -math.pi).expand(*level.shape[:-2], *self.batch_shape, 1).clone()
            high, start = low + 2 * math.pi, 0 * low
        else:
            each = q.means[..., 0] + q.scales[..., 0] * torch.special.ndtri(level)
            low, high = each.amin(-1, keepdim=True), each.amax(-1, keepdim=True)
            start = (q.log_mixing.exp() * each).sum(-1, keepdim=True)
        y, level = start.clamp(low, high), level[..., 0]
        near = 4 * eps * (q.means.abs() + q.scales).amax(-2)
        for _ in range(MOST_STEPS):
            excess = (q.cdf(y) - level)[..., None]
            low, high = torch.where(excess > 0, low, y), torch.where(excess > 0, y, high)
            step = excess / q.log_prob(y).exp()[..., None].clamp_min(tiny)
            moved = y - step
            moved = torch.where((moved > low) & (moved < high), moved, (low + high) / 2)
            done = ((moved - y).abs() <= near) | (excess == 0)
            y = torch.where(excess == 0, y, moved)
            if bool(done.all()):
                break
        return y


class MixtureReference:
    """The Gaussian mixtures of B rows as their reference measures: each row has unit coordinates of its own.

    Args:
        q: Mixtures of one dimension.

    Raises:
        ValueError: If q is no Gaussian mixture of one dimension.
    """

    def __init__(self, q: GaussianMixture) -> None:
        if not isinstance(q, GaussianMixture) or q.event_shape != (1,):
            raise ValueError(
                f"q is a {type(q).__name__} with event shape {tuple(q.event_shape)}; expected a GaussianMixture of one "
                "dimension, whose cdf gives the unit coordinates."
            )
        self.q, self.dim, self.periodic = q, 1, q.periodic

    def __getitem__(self, rows: Tensor | slice) -> MixtureReference:
        """The references of some rows, in any order, also several times."""
        return MixtureReference(self.q[rows])

    def buffers(self) -> Iterator[Tensor]:
        """The tensors that say of what type and where it is."""
        return iter((self.q.means,))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats, (*S, B, 1) or (*S, 1, 1) to (*S, B)."""
        return self.q.log_prob(z)

    def to_unit(self, z: Tensor) -> Tensor:
        """Unit coordinates, (*S, B, 1) or (*S, 1, 1) to (*S, B, 1) in [0, 1]."""
        return self.q.cdf(z)[..., None].clamp(0, 1)

    def from_unit(self, u: Tensor) -> Tensor:
        """Inverse of :meth:`to_unit`: quantiles, (*S, B, 1) or (*S, 1, 1) to (*S, B, 1)."""
        return self.q.icdf(u).to(u.dtype)


class Wrapped(Distribution):
    """A distribution on R^D wrapped onto the circle in its periodic dimensions (angles in [-π, π))."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, distribution: Distribution, periodic: Sequence[bool]) -> None:
        self.distribution, self.periodic = distribution, tuple(periodic)
        super().__init__(distribution.batch_shape, distribution.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, (*S, B, D) to (*S, B)."""
        turns = [range(-TURNS, TURNS + 1) if flag else (0,) for flag in self.periodic]
        shifts = torch.tensor(list(product(*turns)), dtype=value.dtype, device=value.device) * 2 * math.pi
        return torch.stack([self.distribution.log_prob(value + shift) for shift in shifts]).logsumexp(0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw samples, shape (*S, B, D)."""
        y = self.distribution.sample(torch.Size(sample_shape))
        angle = torch.tensor(self.periodic, device=y.device)
        return wrap_angles(y, angle)

"""Importance sampling from a proposal, and from samplers that follow where the density turns out to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from energyreg.checks import check_count
from energyreg.densities.angles import wrap_angles
from energyreg.densities.mixtures import GaussianMixture, draw
from energyreg.inference.energy import AnyEnergy, periodic_of
from energyreg.inference.points import WeightedPoints
from energyreg.randomness import random_like

__all__ = ["AdaptiveImportanceSampling", "ImportanceSampling"]

HALVINGS = 20
"""Bisections of the power of tempered weights: to a millionth."""
INFLATION = 1.2
"""Factor of the covariance: too wide a sampler costs a few samples, too narrow a one its tails."""
SHRINKAGE = 0.2
"""Share of the diagonal alone in the covariance, which few samples leave nearly singular."""
FAINTEST = -1e4
"""Least log-weight, relative to the largest, that a fit reckons with."""
NARROWEST = 1e-2
"""Smallest standard deviation, relative to that of the proposal's own samples in the same dimension."""


@dataclass(frozen=True)
class ImportanceSampling:
    r"""Importance sampling from the proposal, for any number of dimensions.

    Args:
        num_samples: Samples M per row.
        stratified: Spread the samples evenly over the components of a mixture proposal (same distribution of each
            sample, smaller variance).
        quasi_random: Use scrambled Sobol points, shared by all rows, in place of independent ones, where q is a
            :class:`~energyreg.networks.proposals.GaussianMixture`: smaller errors, and results that do not depend on
            the batch.

    Raises:
        ValueError: If num_samples is not a whole number ≥ 1.
    """

    num_samples: int = 1024
    stratified: bool = True
    quasi_random: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_count("num_samples", self.num_samples)

    def num_points(self, dim: int) -> int:
        """Points per row, for any number of dimensions."""
        return self.num_samples

    def sample(self, q: Distribution, *, generator: torch.Generator | None = None) -> Tensor:
        """Samples of q in model space, without gradient, shape (M, B, D)."""
        if not isinstance(q, GaussianMixture):
            return draw(q, self.num_samples, generator)
        if self.quasi_random:
            source = generator.device if generator is not None else "cpu"
            seed = int(torch.randint(2**31, (), generator=generator, device=source))
            sobol = torch.quasirandom.SobolEngine(q.num_uniforms, scramble=True, seed=seed)
            uniforms = sobol.draw(self.num_samples, dtype=torch.double).clamp(1e-7, 1 - 1e-7)
            return q.from_uniforms(uniforms.to(q.means))
        return q.sample((self.num_samples,), generator=generator, stratified=self.stratified)

    def __call__(
        self, f: AnyEnergy, q: Distribution | None = None, *, generator: torch.Generator | None = None
    ) -> WeightedPoints:
        """Return the weighted points, in model space.

        Raises:
            ValueError: If there is no proposal.
        """
        if q is None:
            raise ValueError(
                "Importance sampling needs a proposal q, but the model has none; give it one, or use quadrature."
            )
        y = self.sample(q, generator=generator)
        log_weights = f(y) - q.log_prob(y).detach() - math.log(self.num_samples)
        return WeightedPoints(y, log_weights)


@dataclass(frozen=True)
class AdaptiveImportanceSampling:
    r"""Importance sampling in rounds: from the proposal first, then from Student t distributions fitted to the weights.

    The samples are of two halves, and each half draws from what the **other** half was fitted to: a sampler that is
    fitted to the very points that it is weighed at takes chance for density, and its Z is too small. All samples of a
    half count, those of the first round too, each with the density of the mixture that its rounds together are (the
    balance heuristic):

    .. math:: \log w_m = f(y_m) - \log \sum_r M_r q_r(y_m)

    So a sampler that misses a part of the density does no harm beyond its own samples. With one further round the
    estimate of Z is unbiased, with more nearly so. The fit of a round, a mean and a covariance for each row, takes
    weights :math:`w^a` with the largest :math:`a \le 1` that leaves them `least_effective` effective samples: a few
    large weights of a poor first sampler would otherwise be all that is seen.

    Random numbers are shared by all rows, so that what is said of a row does not depend on the others, where the
    proposal is a :class:`~energyreg.densities.mixtures.GaussianMixture`. It pays for 2 to 10 dimensions and for
    proposals that are some times wider than the density, or beside it. A mode that the proposal misses is missed here,
    too. In seven dimensions take more rounds and samples, such as (256, 4, 256).

    Args:
        num_samples: Samples of the proposal, the first round.
        rounds: Further rounds.
        samples_per_round: Samples of each of them.
        degrees_of_freedom: Of the Student t distributions; fewer mean heavier tails.
        least_effective: Effective samples that the fit of a half has at least, as far as there are.

    Raises:
        ValueError: If a number of samples is not even and positive, rounds is no whole number ≥ 1, degrees_of_freedom
            is below 3, or least_effective is not a finite number ≥ 1.

    Source:
        Cappé, Guillin, Marin and Robert, "Population Monte Carlo", JCGS 2004; Cornuet, Marin, Mira and Robert,
        "Adaptive multiple importance sampling", Scandinavian Journal of Statistics 2012; Veach and Guibas, SIGGRAPH
        1995 (balance heuristic); Koblents and Míguez, Statistics and Computing 2015 (transformed weights). The halves
        are ours, after cross-fitting (Chernozhukov et al., The Econometrics Journal 2018).

    >>> from energyreg.densities.noise import GaussianNoise
    >>> f = lambda y: -0.5 * ((y - 0.1) / 0.1).square().sum(-1)
    >>> q = GaussianNoise([0.1, 0.2, 0.4])(torch.zeros(1, 4))
    >>> points = AdaptiveImportanceSampling()(f, q, generator=torch.Generator().manual_seed(0))
    >>> truth = 2 * math.log(2 * math.pi * 0.1**2)
    >>> bool((points.log_partition - truth).abs() < 0.2), bool(points.effective_sample_size > 100)
    (True, True)
    """

    num_samples: int = 128
    rounds: int = 2
    samples_per_round: int = 128
    degrees_of_freedom: int = 5
    least_effective: float = 24.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("num_samples", "samples_per_round"):
            number = getattr(self, name)
            check_count(name, number, 2)
            if number % 2:
                raise ValueError(f"{name} is {number}; expected an even number, for two halves.")
        check_count("rounds", self.rounds)
        check_count("degrees_of_freedom", self.degrees_of_freedom, 3)  # below, there is no covariance
        least = self.least_effective
        if isinstance(least, bool) or not isinstance(least, int | float) or not 1 <= least < math.inf:
            raise ValueError(f"least_effective is {least!r}; expected a finite number of at least 1.")

    def num_points(self, dim: int) -> int:
        """Points per row of all rounds, for any number of dimensions."""
        return self.num_samples + self.rounds * self.samples_per_round

    def __call__(
        self,
        f: AnyEnergy,
        q: Distribution | None = None,
        *,
        generator: torch.Generator | None = None,
        periodic: Sequence[bool] | None = None,
    ) -> WeightedPoints:
        """Return the weighted points, in model space.

        Args:
            f: Energy of B rows. Where it is -inf there is no density.
            q: Proposal with batch shape (B,) and event shape (D,); it must reach wherever there is density.
            generator: Source of randomness; torch's global one by default.
            periodic: Which dimensions are angles, where f does not say it.

        Raises:
            ValueError: If there is no proposal, or periodic has another length than D.
        """
        if q is None:
            raise ValueError(
                "Adaptive importance sampling needs a proposal q, but the model has none; give it one, or use "
                "quadrature."
            )
        first = ImportanceSampling(self.num_samples // 2, quasi_random=True)
        y = torch.stack([first.sample(q, generator=generator) for _ in range(2)], 1)  # (M / 2, 2, B, D)
        angle = torch.tensor(periodic_of(f, y.shape[-1], periodic), device=y.device)
        values, samplers = f(y), list[_StudentT]()
        # Angles are unrolled from opposite the proposal's direction: a line, on which a Student t has its own density.
        cut = torch.where(angle, torch.atan2(y.sin().mean((0, 1)), y.cos().mean((0, 1))), 0.0)
        points = torch.where(angle, cut + wrap_angles(y - cut, angle), y)
        narrowest = NARROWEST * points.flatten(0, 1).std(0)
        for _ in range(self.rounds):
            log_weights = values.detach() - self._log_mixture(q, samplers, y, points)
            samplers.append(self._fit(points, log_weights, narrowest).swapped())
            fresh = samplers[-1].sample(self.samples_per_round // 2, generator)
            wrapped = wrap_angles(fresh, angle)
            inside = (((fresh - cut).abs() <= math.pi) | ~angle).all(-1)  # beyond, the circle begins again
            values = torch.cat([values, torch.where(inside, f(wrapped), -torch.inf)])
            points, y = torch.cat([points, fresh]), torch.cat([y, wrapped])
        log_weights = values - self._log_mixture(q, samplers, y, points) - math.log(2)
        return WeightedPoints(y.flatten(0, 1), log_weights.flatten(0, 1))

    @torch.no_grad()
    def _log_mixture(self, q: Distribution, samplers: Sequence[_StudentT], y: Tensor, points: Tensor) -> Tensor:
        """Log of the sum of the rounds' densities in a half, each times its samples, (M, 2, B, D) to (M, 2, B)."""
        parts = [q.log_prob(y) + math.log(self.num_samples // 2)]
        parts += [each.log_prob(points) + math.log(self.samples_per_round // 2) for each in samplers]
        return torch.stack(parts).logsumexp(0)

    @torch.no_grad()
    def _fit(self, points: Tensor, log_weights: Tensor, narrowest: Tensor) -> _StudentT:
        """The Student t with the moments of each half's tempered weights, a little wider."""
        known = log_weights.isfinite()
        weights = _tempered(torch.where(known, log_weights, -torch.inf), self.least_effective)
        mean = (weights[..., None] * points).sum(0)
        deviation = points - mean
        covariance = torch.einsum("m...,m...i,m...j->...ij", weights, deviation, deviation)
        scale = (covariance.diagonal(dim1=-2, dim2=-1) + narrowest.square()).sqrt()
        correlation = (1 - SHRINKAGE) * covariance / (scale[..., :, None] * scale[..., None, :])
        correlation.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        # A Student t with unit scale has variance ν / (ν - 2).
        factor = math.sqrt(INFLATION * (self.degrees_of_freedom - 2) / self.degrees_of_freedom)
        root = factor * scale[..., None] * torch.linalg.cholesky(correlation)
        return _StudentT(mean, root, self.degrees_of_freedom)


@dataclass(frozen=True)
class _StudentT:
    """Student t distributions of two halves and B rows.

    Attributes:
        mean: Shape (2, B, D).
        root: Lower triangular root of the scale matrix, shape (2, B, D, D).
        degrees: Of freedom.
    """

    mean: Tensor
    root: Tensor
    degrees: int

    def swapped(self) -> _StudentT:
        """The same with the halves exchanged."""
        return _StudentT(self.mean.flip(0), self.root.flip(0), self.degrees)

    def sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Samples from numbers that all rows share, shape (count, 2, B, D)."""
        dim = self.mean.shape[-1]
        normal = random_like(torch.randn, (count, 2, 1, dim + self.degrees), self.mean, generator)
        radius = (self.degrees / normal[..., dim:].square().sum(-1, keepdim=True)).sqrt()
        return self.mean + (self.root @ (radius * normal[..., :dim])[..., None])[..., 0]

    def log_prob(self, points: Tensor) -> Tensor:
        """Log-density in nats, (M, 2, B, D) to (M, 2, B)."""
        dim, degrees = self.mean.shape[-1], self.degrees
        distance = (points - self.mean).permute(1, 2, 3, 0)  # one triangular system a row
        distance = torch.linalg.solve_triangular(self.root, distance, upper=False).square().sum(2).permute(2, 0, 1)
        constant = math.lgamma((degrees + dim) / 2) - math.lgamma(degrees / 2) - dim / 2 * math.log(degrees * math.pi)
        log_det = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return constant - log_det - (degrees + dim) / 2 * (distance / degrees).log1p()


def _tempered(log_weights: Tensor, least: float) -> Tensor:
    """Weights to the largest power up to 1 that leaves so many effective samples, normalised, (M, *S) to (M, *S)."""
    # Where no point has any density all count alike.
    log_weights = torch.where((log_weights > -torch.inf).any(0), log_weights, 0.0)
    log_weights = log_weights - log_weights.amax(0)
    nothing = log_weights == -torch.inf

    def power(a: Tensor) -> Tensor:
        return torch.where(nothing, -torch.inf, a * log_weights.clamp_min(FAINTEST)).log_softmax(0)

    low, high = torch.zeros_like(log_weights[0]), torch.ones_like(log_weights[0])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = -(2 * power(middle)).logsumexp(0) >= math.log(least)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return power(torch.where(low > 1 - 2.0 ** (1 - HALVINGS), 1.0, low)).exp()

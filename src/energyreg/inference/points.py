"""Weighted points: a set of points in target space with log-weights, from which everything about p(y|x) is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Cells", "WeightedPoints", "pareto_k"]


def half_disagreement(shares: Tensor) -> Tensor:
    """Half the difference on log Z between the even and the odd nodes, from all nodes' shares in Z, (G, B) to (B,)."""
    half = len(shares) // 2
    even, odd = shares[: 2 * half].unflatten(0, (half, 2)).sum(0).log()
    return (even - odd).abs() / 2


class _Tail(NamedTuple):
    """The largest weights of each column, relative to the very largest, and the generalised Pareto fitted to them.

    Attributes:
        order: Where they are among the M weights, ascending by weight, shape (T, B).
        log_largest: Logarithm of the largest weight, shape (B,).
        threshold: The largest weight below the tail, relative to the largest, shape (B,).
        constant: Whether the tail is one value, so that there is nothing to fit, shape (B,).
        k: Shape of the distribution, shape (B,).
        sigma: Its scale, relative to the largest weight, shape (B,).
    """

    order: Tensor
    log_largest: Tensor
    threshold: Tensor
    constant: Tensor
    k: Tensor
    sigma: Tensor


FEWEST = 25
"""Weights below which there is no fit of their tail."""


def _fit_tail(log_weights: Tensor) -> _Tail:
    """Fit the largest min(M / 5, 3 √M) of at least 25 log-weights (M, B), in double precision, without gradient."""
    m = len(log_weights)
    tail = math.ceil(min(0.2 * m, 3 * math.sqrt(m)))
    top, index = log_weights.detach().double().topk(tail + 1, dim=0)
    top, index = top.flip(0), index.flip(0)
    weights = (top - top[-1]).exp()
    excess = weights[1:] - weights[0]  # ascending, shape (tail, B)
    constant = excess[-1] <= 1e-12
    excess = torch.where(constant, torch.ones_like(excess), excess.clamp_min(1e-300))
    # Profile likelihood on a data-driven grid of b = k / scale, then its posterior mean.
    grid = 30 + int(math.sqrt(tail))
    steps = 1 - (grid / (torch.arange(1, grid + 1, dtype=torch.double, device=top.device) - 0.5)).sqrt()
    quartile = excess[max(int(tail / 4 + 0.5) - 1, 0)].clamp_min(1e-300)
    b = steps[:, None] / (3 * quartile) + 1 / excess[-1]
    k = torch.stack([torch.log1p(-row * excess).mean(0) for row in b])
    profile = tail * ((-b / k).log() - k - 1)
    b_mean = (profile.nan_to_num(-torch.inf).softmax(0) * b).sum(0)
    k_hat = torch.log1p(-b_mean * excess).mean(0)
    sigma = -k_hat / b_mean
    return _Tail(index[1:], top[-1], weights[0], constant, (tail * k_hat + 5) / (tail + 10), sigma)


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""Shape :math:`\hat k` of the generalised Pareto distribution fitted to the largest weights.

    Below 0.5 the weights have a finite variance, below 0.7 estimates from them are still useful; above, they are not to
    be trusted. The tail is the largest min(M / 5, 3 √M) weights.

    Args:
        log_weights: Log-weights, unnormalised, shape (M, B).

    Returns:
        The estimate for each column, shape (B,). 0 where the tail is constant (equal weights), NaN where fewer than 25
        weights are too few for a fit.

    Source:
        Vehtari et al., "Pareto smoothed importance sampling", JMLR 2024; Zhang and Stephens, Technometrics 2009, with
        the weak prior towards 0.5 of the former.

    >>> pareto_k(torch.zeros(100, 2))
    tensor([0., 0.])
    """
    if len(log_weights) < FEWEST:
        return torch.full(log_weights.shape[1:], torch.nan, dtype=log_weights.dtype, device=log_weights.device)
    tail = _fit_tail(log_weights)
    return torch.where(tail.constant, torch.zeros_like(tail.k), tail.k).to(log_weights.dtype)


@dataclass(frozen=True)
class WeightedPoints:
    r"""Points y_m with weights w_m that stand for the measure exp(f(x, y)) dy.

    .. math:: \sum_m w_m h(y_m) \approx \int e^{f(x, y)} h(y) dy \quad \text{for any function } h

    With samples of q, log w_m = f(y_m) - log q(y_m) - log M; with quadrature, f(y_m) plus the log-weight of the node.

    Args:
        y: Points, shape (M, B, D), or (M, 1, D) where all rows share them.
        log_weights: Log-weights, shape (M, B).
        independent: Whether the points are independent draws (importance sampling). Otherwise they are stratified or
            deterministic nodes in order, and the error of log Z is judged from two interleaved halves of them.
    """

    y: Tensor
    log_weights: Tensor
    independent: bool = True

    def __post_init__(self) -> None:
        """Check that the shapes agree.

        Raises:
            ValueError: If the numbers of points or rows of y and log_weights differ.
        """
        expected = self.log_weights.shape
        if (
            self.y.ndim != 3
            or len(expected) != 2
            or len(self.y) != expected[0]
            or self.y.shape[1] not in (1, expected[1])
        ):
            raise ValueError(
                f"y has shape {tuple(self.y.shape)} and log_weights {tuple(expected)}; expected (M, B, D) or (M, 1, "
                f"D), and (M, B)."
            )

    @property
    def log_partition(self) -> Tensor:
        """Estimate of log Z, shape (B,)."""
        return self.log_weights.logsumexp(0)

    @property
    def log_partition_stderr(self) -> Tensor:
        """Standard error of log Z, shape (B,).

        For independent points from the variance of the weights (delta method). For ordered nodes half the difference
        between the estimates of the even and the odd ones, which overstates the error of a rule that converges.
        """
        if self.independent:
            m = len(self.log_weights)
            relative = self.log_normalised_weights.exp() * m
            return ((relative - 1).square().sum(0) / (m * (m - 1) or math.nan)).sqrt()
        half = len(self.log_weights) // 2 * 2
        return (self.log_weights[0:half:2].logsumexp(0) - self.log_weights[1:half:2].logsumexp(0)).abs() / 2

    @property
    def log_normalised_weights(self) -> Tensor:
        """Log-weights that sum to one over the points, shape (M, B)."""
        return self.log_weights - self.log_partition

    @property
    def effective_sample_size(self) -> Tensor:
        """Kish's effective sample size, between 1 and M, shape (B,)."""
        return (-(2 * self.log_normalised_weights).logsumexp(0)).exp()

    @property
    def pareto_k(self) -> Tensor:
        """Pareto shape of the weights' tail, shape (B,); see :func:`pareto_k`."""
        return pareto_k(self.log_weights)

    def expectation(self, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Self-normalised mean of a function of y under p(y|x).

        Args:
            function: Maps points (M, B, D) to values (M, B, ...); the identity by default.

        Returns:
            The mean, shape (B, ...).
        """
        values = self.y if function is None else function(self.y)
        weights = self.log_normalised_weights.exp()
        weights = weights.reshape(weights.shape + (1,) * (values.ndim - 2))
        return (weights * values).sum(0)

    def indices_at(self, uniforms: Tensor) -> Tensor:
        """Indices of points by the inverse of the discrete cdf over their order.

        Args:
            uniforms: Numbers in [0, 1), shape (S, B).

        Returns:
            Indices, shape (S, B).
        """
        cumulative = self.log_normalised_weights.exp().double().cumsum(0).T.contiguous()
        # Scaled by the last sum, which rounding leaves near one, so that no index can fall beyond the end.
        scaled = uniforms.T.to(cumulative) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, scaled.contiguous(), right=True).clamp_max(cumulative.shape[1] - 1).T

    def pareto_smoothed(self) -> WeightedPoints:
        r"""Return the points with their largest weights replaced by those that a Pareto tail would have.

        The largest min(M / 5, 3 √M) weights of a row become, in their order, the quantiles of the fitted generalised
        Pareto distribution,

        .. math:: w_{(j)} = u + \frac{\sigma}{k} \left[\left(1 - \frac{j - 1/2}{T}\right)^{-k} - 1\right]

        with the threshold u, but at most the largest weight there was. That bounds the influence of a single point: a
        little bias, and a variance that is finite where that of the raw weights is not.

        Returns:
            Points with the same y, and log-weights without gradient. Rows with a constant tail stay as they are, points
            without weight too, and all of them where M < 25.

        Source:
            Vehtari et al., "Pareto smoothed importance sampling", JMLR 2024.
        """
        if len(self.log_weights) < FEWEST:
            return replace(self, log_weights=self.log_weights.detach())
        raw, tail = self.log_weights.detach(), _fit_tail(self.log_weights)
        count = len(tail.order)
        level = (torch.arange(count, dtype=torch.double, device=raw.device)[:, None] + 0.5) / count
        exponent = -torch.log1p(-level)  # a standard exponential's quantile, which k bends
        bent = torch.where(tail.k.abs() < 1e-9, exponent, torch.expm1(tail.k * exponent) / tail.k)
        # Nothing exceeds the largest raw weight, which is 1 here.
        smoothed = (tail.threshold + tail.sigma * bent).log().clamp_max(0) + tail.log_largest
        before = raw.gather(0, tail.order)
        kept = tail.constant | ~smoothed.isfinite() | (before == -torch.inf)
        return replace(self, log_weights=raw.scatter(0, tail.order, torch.where(kept, before, smoothed.to(raw.dtype))))

    def resample(
        self, num_samples: int, *, systematic: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw points with replacement, in proportion to their weights.

        Args:
            num_samples: How many per row, S.
            systematic: Take S evenly spaced levels of the discrete cdf, shifted by one uniform number per row, in place
                of S independent ones. Every draw has the same law as before, and point m is drawn S w_m times to within
                less than one. The draws of a row are in random order.
            generator: Source of randomness; torch's global one by default.

        Returns:
            Points, shape (S, B, D): approximate samples of p(y|x).

        Source:
            Gustafsson et al., AISTATS 2022 (samples by resampling from the learned proposal); Carpenter, Clifford and
            Fearnhead, IEE Proceedings 1999 (systematic resampling).
        """
        device = self.log_weights.device
        # On the generator's own device, so that a CPU generator serves points on a GPU.
        source = device if generator is None else generator.device
        shape = (num_samples, self.log_weights.shape[1])
        uniforms = torch.rand(
            (1, shape[1]) if systematic else shape, generator=generator, dtype=torch.double, device=source
        )
        if systematic:
            # In the points' order, draw s of one row would go with draw s of every other.
            order = torch.rand(shape, generator=generator, dtype=torch.double, device=source).argsort(0)
            uniforms = (order + uniforms) / num_samples
        index = self.indices_at(uniforms.to(device))
        y = self.y.expand(-1, index.shape[1], -1)
        return y.gather(0, index[..., None].expand(-1, -1, y.shape[-1]))

    def quantiles(self, levels: Tensor) -> Tensor:
        """Quantiles of each dimension's marginal.

        Args:
            levels: Probabilities, shape (L, B).

        Returns:
            The smallest point whose cumulative weight reaches the level, shape (L, B, D).
        """
        weights = self.log_normalised_weights.exp().double()
        y = self.y.expand(-1, weights.shape[1], -1)
        ordered, order = y.sort(0)
        cumulative = weights[..., None].expand(y.shape).gather(0, order).cumsum(0)
        cumulative = (cumulative / cumulative[-1]).permute(1, 2, 0).contiguous()  # (B, D, M)
        targets = levels.T[:, None].expand(-1, y.shape[-1], -1).to(cumulative).contiguous()
        index = torch.searchsorted(cumulative, targets).clamp_max(len(y) - 1)
        return ordered.gather(0, index.permute(2, 0, 1))


@dataclass(frozen=True)
class Cells:
    """Weighted points in one dimension with the cells that they stand for, in unit coordinates.

    The density is linear within each cell, with the cell's mass and a slope from its neighbours, so that the cdf is
    quadratic there and its inverse has a closed form.

    Args:
        edges: Ascending edges of the cells from 0 to 1, shape (G + 1,), shared by all rows, or (G + 1, B).
        centres: The point within each cell where the energy was evaluated, shape (G,) or (G, B).
        log_masses: Unnormalised log-masses of the cells, shape (G, B).
    """

    edges: Tensor
    centres: Tensor
    log_masses: Tensor

    @cached_property
    def log_partition(self) -> Tensor:
        """Log Z, shape (B,)."""
        return self.log_masses.logsumexp(0)

    @property
    def log_partition_stderr(self) -> Tensor:
        """Half the disagreement of two interleaved halves on log Z, shape (B,)."""
        return half_disagreement(self.masses)

    @staticmethod
    def _columns(table: Tensor) -> Tensor:
        """A table with a column per row, or one column where all rows share it, in double precision."""
        return (table if table.ndim == 2 else table[:, None]).double()

    @property
    def widths(self) -> Tensor:
        """Widths of the cells, above zero, shape (G, 1) or (G, B), in double precision."""
        return self._columns(self.edges).diff(dim=0).clamp_min(1e-300)

    @property
    def log_widths(self) -> Tensor:
        """Their logarithms."""
        return self.widths.log()

    @property
    def row_centres(self) -> Tensor:
        """The centres of each row, shape (G, B), in double precision."""
        return self._columns(self.centres).expand(-1, self.log_masses.shape[1])

    @cached_property
    def masses(self) -> Tensor:
        """Masses that sum to one, shape (G, B)."""
        return self.log_masses.softmax(0)

    @cached_property
    def _cumulative(self) -> Tensor:
        """Cumulative probabilities at the edges, shape (B, G + 1), in double precision."""
        cumulative = self.masses.new_zeros(self.masses.shape[1], len(self.masses) + 1, dtype=torch.double)
        torch.cumsum(self.masses.T.contiguous(), 1, dtype=torch.double, out=cumulative[:, 1:])
        return cumulative.div_(cumulative[:, -1:].clone())

    @staticmethod
    def _at(table: Tensor, index: Tensor) -> Tensor:
        """Entries of a table (G,) or (G, B) at indices (B, S), in double precision."""
        return (table[index] if table.ndim == 1 else table.gather(0, index.T).T).double()

    @staticmethod
    def _find(table: Tensor, value: Tensor) -> Tensor:
        """Index of the cell of each value, row by row: a table (G + 1,) or (B, G + 1), values (B, S)."""
        return torch.searchsorted(table, value, right=True).sub_(1).clamp_(0, table.shape[-1] - 2)

    def _slope(self, index: Tensor) -> Tensor:
        """Half the relative change of the density across the cells, from their neighbours, at indices (B, S).

        At most what keeps the density positive; zero in the first and the last cell.
        """
        count = len(self.masses)
        if count < 3:
            return torch.zeros(index.shape, dtype=torch.double, device=index.device)
        inner = index.clamp(1, count - 2)
        width, density, centre = [], [], []
        for cell in (inner - 1, inner, inner + 1):
            width.append((self._at(self.edges, cell + 1) - self._at(self.edges, cell)).clamp_min(1e-300))
            density.append(self._at(self.masses, cell) / width[-1])
            centre.append(self._at(self.centres, cell))
        rise = (density[2] - density[0]) / (centre[2] - centre[0]).clamp_min(1e-300)
        slope = (rise * width[1] / (2 * density[1]).clamp_min(1e-300)).clamp(-1, 1)
        return torch.where(inner == index, slope, 0.0)

    def cdf(self, u: Tensor) -> Tensor:
        """Cumulative distribution function at unit coordinates, (S, B) to (S, B), in double precision."""
        value, cumulative = u.double().T.contiguous(), self._cumulative
        edges = self.edges.double()
        edges = (edges if edges.ndim == 1 else edges.T).contiguous()
        index = self._find(edges, value)
        start, stop = self._at(self.edges, index), self._at(self.edges, index + 1)
        t = ((value - start) / (stop - start).clamp_min(1e-300)).clamp(0, 1)
        share = t + self._slope(index) * t * (t - 1)
        return torch.lerp(cumulative.gather(1, index), cumulative.gather(1, index + 1), share).T

    def icdf(self, level: Tensor) -> Tensor:
        """Unit coordinates at cumulative probabilities, (S, B) to (S, B), in double precision."""
        value, cumulative = level.double().T.contiguous(), self._cumulative
        index = self._find(cumulative, value)
        start, stop = cumulative.gather(1, index), cumulative.gather(1, index + 1)
        share = ((value - start) / (stop - start).clamp_min(1e-300)).clamp(0, 1)
        slope = self._slope(index)
        # The root of slope t² + (1 - slope) t = share in (0, 1), in the form that does not cancel.
        linear = 1 - slope
        t = 2 * share / (linear + (linear.square() + 4 * slope * share).clamp_min(0).sqrt()).clamp_min(1e-300)
        return torch.lerp(self._at(self.edges, index), self._at(self.edges, index + 1), t.clamp(0, 1)).T

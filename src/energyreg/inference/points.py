"""Weighted points: a set of points in target space with log-weights, from which everything about p(y|x) is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from energyreg.inference.cells import Cells
from energyreg.inference.pareto import pareto_k, smoothed

__all__ = ["Cells", "WeightedPoints", "pareto_k"]


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

    @property
    def masses(self) -> Tensor:
        """Weights that sum to one over the points, shape (M, B)."""
        return self.log_weights.softmax(0)

    def log_density(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f at the points, shape (M, B)."""
        return f(self.y)

    def cdf(self, z: Tensor) -> Tensor:
        """Weight of the points up to z in one dimension, (S, B) to (S, B)."""
        points, weights = self.y[..., 0], self.masses
        return torch.stack([(weights * (points <= row)).sum(0) for row in z])

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
        return replace(self, log_weights=smoothed(self.log_weights))

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

    def draw(self, uniforms: Tensor) -> Tensor:
        """Points drawn with replacement by the inverse of the discrete cdf, (S, B) to (S, B, D)."""
        index = self.indices_at(uniforms)
        return self.y.expand(-1, index.shape[1], -1).gather(0, index[..., None].expand(-1, -1, self.y.shape[-1]))

    def quantiles(self, levels: Tensor, middle: Tensor | None = None, angle: Tensor | None = None) -> Tensor:
        """Quantiles of each dimension's marginal.

        Args:
            levels: Probabilities, shape (L, B).
            middle: Where angles are counted from opposite of, shape (B, D); they are taken as numbers by default.
            angle: Which dimensions are angles, shape (D,).

        Returns:
            The smallest point whose cumulative weight reaches the level, shape (L, B, D).
        """
        weights = self.log_normalised_weights.exp().double()
        y = self.y.expand(-1, weights.shape[1], -1)
        if middle is not None and angle is not None:
            y = torch.where(angle, (y - middle + math.pi).remainder(2 * math.pi) - math.pi, y)
        ordered, order = y.sort(0)
        cumulative = weights[..., None].expand(y.shape).gather(0, order).cumsum(0)
        cumulative = (cumulative / cumulative[-1]).permute(1, 2, 0).contiguous()  # (B, D, M)
        targets = levels.T[:, None].expand(-1, y.shape[-1], -1).to(cumulative).contiguous()
        index = torch.searchsorted(cumulative, targets).clamp_max(len(y) - 1)
        found = ordered.gather(0, index.permute(2, 0, 1))
        if middle is None or angle is None:
            return found
        return torch.where(angle, (found + middle + math.pi).remainder(2 * math.pi) - math.pi, found)

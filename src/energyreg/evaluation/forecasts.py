"""Simple forecasts that a model is compared with.

The constant forecast is the marginal distribution of the training targets, the same for every row: what is known
without any x. A model that does not beat it has learned nothing. The linear forecast is a Gaussian of constant width
around a linear function of the inputs. A model that does not beat that one has found neither curves nor shapes. Both
were learned from the model's training rows, never from those that they are scored on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from energyreg.estimators.linear import LinearGaussian
from energyreg.evaluation.scores import Array
from energyreg.models.chain import EnergyChain

if TYPE_CHECKING:
    from energyreg.estimators.core import DensityRegressor

__all__ = ["LinearForecast", "MarginalForecast"]

MARGINAL_POINTS = 8_192
"""Equally probable points that stand for the marginal distribution."""


class MarginalForecast:
    """The marginal distribution of the training targets that a fitted estimator holds, as a constant forecast.

    Args:
        regressor: The estimator, fitted.
    """

    def __init__(self, regressor: DensityRegressor) -> None:
        self.regressor, self.space = regressor, regressor.model_.space
        self.reference = reference_of(regressor.model_)
        self.outputs = regressor.n_outputs_
        levels = (torch.arange(MARGINAL_POINTS, dtype=torch.double) + 0.5) / MARGINAL_POINTS
        with torch.no_grad():
            z = self.reference.from_unit(levels[:, None].expand(-1, self.outputs).to(self._dtype))
            self.points = np.sort(self.space.to_user(z).double().cpu().numpy(), axis=0)
        self.mean = np.array([_mean(self.points[:, d], period) for d, period in enumerate(regressor.target_.periods)])

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.regressor.model_.parameters()).dtype

    def quantiles(self, levels: Sequence[float]) -> Array:
        """Quantiles of each output, shape (L, D)."""
        return np.quantile(self.points, levels, axis=0)

    def log_density(self, y: Array) -> Array:
        """Log-density of targets (B, D), shape (B,), counted as `EnergyRegressor.score_samples` counts it."""
        step = self.regressor.lattice_step_
        target = torch.as_tensor(y)
        with torch.no_grad():
            z = self.space.to_model(target).to(self._dtype)
            result = self.reference.log_prob(z).double() + self.space.log_abs_det_jacobian(target).double()
            log_p: Array = torch.where(self.space.contains(target), result, -math.inf).numpy()
            if step is None:
                return log_p
            low, high = self.regressor.target_.bins(y, step)
            mass = (self._cdf(high) - self._cdf(low))[:, 0]
        edge = self.regressor.target_.first_bin_edge
        total = 1.0 if edge is None else 1.0 - float(self._cdf(np.full((1, 1), edge))[0, 0])
        with np.errstate(divide="ignore"):
            return np.where(mass > 1e-6, np.log(mass / total / (high - low)[:, 0]), log_p - math.log(total))

    def _cdf(self, y: Array) -> Array:
        return self.reference.to_unit(self.space.to_model(torch.as_tensor(y)).to(self._dtype)).double().numpy()

    def pit(self, y: Array) -> Array:
        """Probability below each target, counted from the lower end of a circle, shape (B, D)."""
        columns = [np.searchsorted(self.points[:, d], y[:, d]) / len(self.points) for d in range(self.outputs)]
        return np.stack(columns, 1)


class LinearForecast:
    """A Gaussian of constant width around a linear function of the inputs, in the estimator's target space.

    Positive targets are linear in their logarithm, bounded ones in their logit. An angle's mean direction is that of
    two linear functions, for its cosine and its sine, and its noise is a Gaussian wrapped around the circle. Several
    outputs have a joint Gaussian. Categories are one-hot. See
    :class:`~energyreg.estimators.linear.LinearGaussian` for the fit.

    Args:
        regressor: The estimator, fitted; its inputs and target space are taken, nothing of its network.
        table: Rows to fit to, at least 3; by default the estimator's training rows, whose line it keeps.
        y: Their targets, shape (B, D).

    Raises:
        ValueError: If there is no table, and the estimator keeps no line: it was saved by an older version, or learned
            from fewer than 3 rows.
    """

    def __init__(self, regressor: DensityRegressor, table: Any = None, y: Array | None = None) -> None:
        self.regressor, self.space, self.periods = regressor, regressor.model_.space, regressor.target_.periods
        self.circles = np.array([period > 0 for period in self.periods])
        if table is None or y is None:
            if regressor.linear_baseline_ is None:
                raise ValueError(
                    "the estimator keeps no linear baseline: it was saved by an older version, or learned from fewer "
                    "than 3 rows. Fit it again to compare it with one."
                )
            self.linear = regressor.linear_baseline_
        else:
            self.linear = LinearGaussian.fit(
                regressor.encode(table), self._to_model(y),
                cardinalities=regressor.preprocessor_.cardinalities_, circles=self.circles.tolist(),
            )  # fmt: skip
        self.covariance = self.linear.covariance
        self.scale = np.sqrt(np.diag(self.covariance))

    def _to_model(self, y: Array) -> Array:
        return self.space.to_model(torch.as_tensor(y)).double().cpu().numpy()

    def _to_user(self, z: Array) -> Array:
        return self.space.to_user(torch.as_tensor(z)).double().cpu().numpy()

    def location(self, table: Any) -> Array:
        """The linear function of each row, in the target space, shape (B, D)."""
        return self.linear.location(self.regressor.encode(table))

    def log_density(self, table: Any, y: Array) -> Array:
        """Log-density of targets (B, D), shape (B,), counted as `EnergyRegressor.score_samples` counts it."""
        location = self.location(table)
        if self.regressor.lattice_step_ is not None:
            low, high = self.regressor.target_.bins(y, self.regressor.lattice_step_)
            ends = []
            for end, beyond in ((low, -np.inf), (high, np.inf)):  # a bound of the space is its end
                inside = self.space.contains(torch.as_tensor(end)).cpu().numpy()
                z = (self._to_model(end)[:, 0] - location[:, 0]) / self.scale[0]
                ends.append(np.where(inside, z, beyond))
            edge = self.regressor.target_.first_bin_edge
            if edge is not None:
                below = (self._to_model(np.full_like(y, edge))[:, 0] - location[:, 0]) / self.scale[0]
                return _log_normal_mass(*ends) - _log_normal_mass(below, np.full_like(below, np.inf))
            return _log_normal_mass(*ends) - np.log(high - low)[:, 0]
        residual = self.linear.residual(self._to_model(y), location)
        factor = np.linalg.cholesky(self.covariance)
        constant = -np.log(np.diag(factor)).sum() - 0.5 * len(factor) * math.log(2 * math.pi)
        total = np.full(len(y), -np.inf)
        for turns in product(*[(-1, 0, 1) if circle else (0,) for circle in self.circles]):
            scaled = np.linalg.solve(factor, (residual + 2 * math.pi * np.array(turns)).T)
            total = np.logaddexp(total, constant - 0.5 * (scaled**2).sum(0))
        target = torch.as_tensor(y)
        total = total + self.space.log_abs_det_jacobian(target).double().cpu().numpy()
        return np.where(self.space.contains(target).cpu().numpy(), total, -np.inf)

    def quantiles(self, table: Any, levels: Sequence[float]) -> Array:
        """Quantiles of each output, on a circle counted from opposite the mean, shape (B, L, D)."""
        z = torch.special.ndtri(torch.tensor(levels, dtype=torch.double)).numpy()[:, None] * self.scale
        z = np.where(self.circles, z.clip(-math.pi, math.pi), z)
        location = self.location(table)
        y = self._to_user(location[:, None] + z)
        for d, period in enumerate(self.periods):
            if period:  # beyond the range rather than around the circle, so that they rise
                middle = self._to_user(location)[:, None, d]
                y[..., d] = middle + z[:, d] * period / (2 * math.pi)
        return y

    def pit(self, table: Any, y: Array) -> Array:
        """Probability below each target, shape (B, D)."""
        z = self.linear.residual(self._to_model(y), self.location(table)) / self.scale
        return torch.special.ndtr(torch.as_tensor(z)).numpy()

    def sample(self, table: Any, count: int, rng: np.random.Generator) -> Array:
        """Draws in user units, shape (B, count, D)."""
        location = self.location(table)
        noise = rng.standard_normal((len(location), count, len(self.circles)))
        return self._to_user(location[:, None] + noise @ np.linalg.cholesky(self.covariance).T)


def reference_of(model: Any) -> Any:
    """The reference measure of a model, an ensemble or a chain."""
    if isinstance(model, EnergyChain):
        return model.reference
    base = getattr(model, "members", [model])[0].base
    return getattr(base, "reference", base)


def _mean(points: Array, period: float) -> float:
    if not period:
        return float(points.mean())
    angle = 2 * math.pi / period * points
    return float(math.atan2(np.sin(angle).mean(), np.cos(angle).mean()) * period / (2 * math.pi))


def _log_normal_mass(low: Array, high: Array) -> Array:
    """Log-probability of a standard normal between two ends, exact in both tails."""
    flip = low > 0  # by symmetry both ends lie below or around 0, where log Φ keeps its digits
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    upper, lower = (torch.special.log_ndtr(torch.as_tensor(end)).numpy() for end in (high, low))
    with np.errstate(divide="ignore"):
        return upper + np.log(-np.expm1(np.minimum(lower - upper, 0.0)))

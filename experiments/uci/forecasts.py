"""What the methods predict, scored in one way.

A forecast has `nll(y)`, `crps(y)`, `mean()` and `interval(level)`, for B rows in the units of y; scores are means over
the rows. One without a density (quantiles) has None for the NLL.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import scoringrules
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import norm

from energyreg import EnergyRegressor
from energyreg.evaluation import metrics

__all__ = ["EstimatorForecast", "Forecast", "GaussianForecast", "QuantileForecast", "SampleForecast"]

Array = NDArray[np.float64]


class Forecast(Protocol):
    """Predictive distributions of B rows."""

    def nll(self, y: Array) -> float | None:
        """Mean of −log p(y|x), in nats."""

    def crps(self, y: Array) -> float:
        """Mean continuous ranked probability score."""

    def mean(self) -> Array:
        """Means, shape (B,)."""

    def interval(self, level: float) -> Array:
        """Equal-tailed intervals, shape (B, 2)."""


class GaussianForecast:
    """Normal distributions.

    Args:
        mean: Shape (B,).
        scale: Standard deviations, shape (B,).
    """

    def __init__(self, mean: Array, scale: Array) -> None:
        self._mean, self._scale = mean, np.maximum(scale, 1e-9)

    def nll(self, y: Array) -> float:
        return float(-norm.logpdf(y, self._mean, self._scale).mean())

    def crps(self, y: Array) -> float:
        return float(scoringrules.crps_normal(y, self._mean, self._scale).mean())

    def mean(self) -> Array:
        return self._mean

    def interval(self, level: float) -> Array:
        half = norm.ppf(0.5 + level / 2) * self._scale
        return np.stack([self._mean - half, self._mean + half], 1)


class QuantileForecast:
    """Quantiles at even levels (i - 1/2) / K, without a density. The mean is that of the quantiles.

    Args:
        values: Shape (B, K); they are sorted, for quantiles learned one by one may cross.
    """

    def __init__(self, values: Array) -> None:
        self._values = np.sort(values, axis=1)
        self._levels = (np.arange(values.shape[1]) + 0.5) / values.shape[1]

    def nll(self, y: Array) -> None:
        return None

    def crps(self, y: Array) -> float:
        return float(scoringrules.crps_quantile(y, self._values, self._levels).mean())

    def mean(self) -> Array:
        return self._values.mean(1)

    def interval(self, level: float) -> Array:
        ends = [(1 - level) / 2, (1 + level) / 2]
        return np.stack([np.interp(ends, self._levels, row) for row in self._values])


class SampleForecast:
    """Draws; the density is a Gaussian kernel estimate with Silverman's bandwidth, as for a sample of any kind.

    Args:
        samples: Shape (B, S).
    """

    def __init__(self, samples: Array) -> None:
        self._samples = samples
        count = samples.shape[1]
        spread = np.minimum(samples.std(1, ddof=1), np.subtract(*np.quantile(samples, [0.75, 0.25], axis=1)) / 1.349)
        least = 1e-3 * samples.std()
        self._bandwidth = np.maximum(0.9 * spread * count**-0.2, least)

    def nll(self, y: Array) -> float:
        log_kernels = norm.logpdf(y[:, None], self._samples, self._bandwidth[:, None])
        return float(math.log(self._samples.shape[1]) - logsumexp(log_kernels, axis=1).mean())

    def crps(self, y: Array) -> float:
        return float(scoringrules.crps_ensemble(y, self._samples, estimator="fair").mean())

    def mean(self) -> Array:
        return self._samples.mean(1)

    def interval(self, level: float) -> Array:
        return np.quantile(self._samples, [(1 - level) / 2, (1 + level) / 2], axis=1).T


class EstimatorForecast:
    """What a fitted `EnergyRegressor`, or a rival with its manners, predicts.

    Args:
        regressor: The fitted estimator.
        x: Rows, shape (B, F).
    """

    def __init__(self, regressor: EnergyRegressor, x: Array) -> None:
        self._regressor, self._x = regressor, x

    def nll(self, y: Array) -> float:
        return float(-self._regressor.score_samples(self._x, y).mean())

    def crps(self, y: Array) -> float:
        return metrics.crps(self._regressor.predict_distribution(self._x), torch.as_tensor(y))

    def mean(self) -> Array:
        return self._regressor.predict(self._x)

    def interval(self, level: float) -> Array:
        return self._regressor.predict_interval(self._x, level)

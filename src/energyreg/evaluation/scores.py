"""Scores of single rows, from the quantiles of a forecast and the targets that came true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVELS", "Evaluation", "RowScores", "circular_crps", "score_quantiles"]

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Probabilities of the intervals that are scored."""
QUANTILES = 128
"""Levels of the midpoint rule for the CRPS."""
MIDPOINTS = tuple((i + 0.5) / QUANTILES for i in range(QUANTILES))
"""These levels."""
TAILS = (*((1 - level) / 2 for level in LEVELS), *(1 - (1 - level) / 2 for level in LEVELS))
"""Levels of the lower ends of the intervals, then of the upper ends."""
ALL_LEVELS = (*MIDPOINTS, 0.5, *TAILS)
"""Levels of the quantiles that all scores are made of: for the CRPS, the median, the ends of the intervals."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RowScores:
    """Scores of B rows of one forecast.

    Attributes:
        nll: −log p of the observed target (all outputs jointly), in nats and the units of y, shape (B,).
        crps: Continuous ranked probability score, on a circle that of :func:`circular_crps`, shape (B, D).
        error: Mean minus target; along the shorter way on a circle, shape (B, D).
        median_error: Median minus target (on a circle, mean minus target), shape (B, D).
        inside: Whether the equal-tailed intervals of `LEVELS` hold the target, shape (B, L, D).
        width: Their widths, shape (B, L, D).
        pit: Probability of what lies below the target, shape (B, D).
    """

    nll: Array
    crps: Array
    error: Array
    median_error: Array
    inside: Array
    width: Array
    pit: Array

    @classmethod
    def join(cls, parts: Sequence[RowScores]) -> RowScores:
        """The rows of several, one after another."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__})

    def select(self, rows: NDArray[np.int64]) -> RowScores:
        """The rows at the given positions, in that order."""
        return RowScores(**{name: getattr(self, name)[rows] for name in self.__annotations__})

    def summary(self) -> dict[str, Any]:
        """Means over the rows, ready for JSON; of several outputs the NLL is joint and the rest a list."""
        means: dict[str, Any] = {
            "crps": self.crps.mean(0),
            "rmse": np.sqrt((self.error**2).mean(0)),
            "mae": np.abs(self.median_error).mean(0),
        }
        for index, level in enumerate(LEVELS):
            means[f"coverage_{level * 100:g}"] = self.inside[:, index].mean(0)
            means[f"width_{level * 100:g}"] = self.width[:, index].mean(0)
        one = self.crps.shape[1] == 1
        return {"nll": float(self.nll.mean())} | {
            name: float(value[0]) if one else [float(v) for v in value] for name, value in means.items()
        }


@dataclass(frozen=True)
class Evaluation:
    """Scores of the model and of the simple forecasts on the same rows.

    Attributes:
        model: Of the model.
        marginal: Of the constant forecast, :class:`~energyreg.evaluation.forecasts.MarginalForecast`.
        linear: Of the line through the training rows, :class:`~energyreg.evaluation.forecasts.LinearForecast`; None
            where the estimator keeps none.
    """

    model: RowScores
    marginal: RowScores
    linear: RowScores | None = None

    @property
    def rows(self) -> int:
        """How many rows there were."""
        return len(self.model.nll)


def score_quantiles(
    y: Array,
    quantiles: Array,
    *,
    nll: Array,
    mean: Array,
    pit: Array,
    periods: Sequence[float],
    intervals: tuple[Array, Array] | None = None,
) -> RowScores:
    """Score a forecast that is given by its quantiles.

    Args:
        y: Observed targets, shape (B, D).
        quantiles: Quantiles of `ALL_LEVELS`, shape (B, len(ALL_LEVELS), D).
        nll: −log p of the targets, shape (B,).
        mean: Means, shape (B, D).
        pit: Probabilities below the targets, shape (B, D).
        periods: Period of each output, 0 for one that is not periodic.
        intervals: Lower and upper ends of the intervals of `LEVELS`, shape (B, L, D) each; the quantiles by default.

    Returns:
        Scores by row.
    """
    middles, median = quantiles[:, :QUANTILES], quantiles[:, QUANTILES]
    if intervals is None:
        ends = quantiles[:, QUANTILES + 1 :]
        intervals = ends[:, : len(LEVELS)], ends[:, len(LEVELS) :]
    low, high = intervals
    tau = np.array(MIDPOINTS)[:, None]
    below = y[:, None] - middles
    crps = 2 * np.maximum(tau * below, (tau - 1) * below).mean(1)
    error, median_error = mean - y, median - y
    offset, width = y[:, None] - low, high - low
    for d, period in enumerate(periods):
        if period:  # a median there depends on where the circle is cut; the mean direction does not
            crps[:, d] = circular_crps(middles[:, :, d], y[:, d], period)
            error[:, d] = (error[:, d] + period / 2) % period - period / 2
            median_error[:, d] = error[:, d]
            offset[..., d] %= period
    inside = ((offset >= 0) & (offset <= width)).astype(np.float64)
    return RowScores(nll, crps, error, median_error, inside, width, pit)


def circular_crps(points: Array, y: Array, period: float) -> Array:
    r"""CRPS on a circle of forecasts that are M equally probable points; where the circle is cut does not matter.

    .. math:: E\,d(Y, y) - \tfrac12 E\,d(Y, Y'), \qquad d(a, b) = \text{the shorter arc between } a \text{ and } b

    Args:
        points: Points of each forecast, shape (B, M).
        y: Observed targets, shape (B,).
        period: Length of the whole circle, in the unit of y.

    Returns:
        Scores in the unit of y, shape (B,).

    Source:
        Grimit, Gneiting, Berrocal and Johnson, QJRMS 2006.

    >>> circular_crps(np.array([[350.0]]), np.array([10.0]), 360.0)
    array([20.])
    """
    count = points.shape[1]
    score = _arc(points - y[:, None], period).mean(1)
    for shift in range(1, count):  # all pairs, without an array of all pairs
        score -= 0.5 * _arc(points - np.roll(points, shift, 1), period).mean(1) / count
    return score


def _arc(difference: Array, period: float) -> Array:
    """Length of the shorter way around."""
    difference = np.abs(difference) % period
    return np.minimum(difference, period - difference)

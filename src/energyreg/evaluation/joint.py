"""Scores of several outputs together, from draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from energyreg.evaluation.forecasts import MARGINAL_POINTS, LinearForecast, MarginalForecast
from energyreg.evaluation.scores import Array

if TYPE_CHECKING:
    from energyreg.estimators.core import DensityRegressor

__all__ = ["JointScores", "evaluate_jointly"]

JOINT_SAMPLES = 128
"""Draws per row."""


@dataclass(frozen=True)
class JointScores:
    """Scores of B rows of one forecast of several outputs together.

    Attributes:
        energy_score: The CRPS of several dimensions, over standardised outputs (angles as points on a circle), (B,).
        level: Probability of the smallest region that holds the target (up to the draws it is estimated from),
            uniform for a calibrated forecast, shape (B,); None where the forecast has no density of draws.
    """

    energy_score: Array
    level: Array | None


def evaluate_jointly(
    regressor: DensityRegressor, table: Any, y: Array, linear: LinearForecast | None = None, *, seed: int = 0
) -> tuple[JointScores, JointScores, JointScores | None]:
    """Scores of several outputs together: of the model, of the marginals as if independent, and of the linear forecast.

    Args:
        regressor: The estimator, fitted to D > 1 outputs.
        table: pandas frame of B rows.
        y: Their targets, shape (B, D).
        linear: The linear forecast; None leaves the last part out.
        seed: Seed of the draws.

    Returns:
        The scores of the three.

    Source:
        Gneiting and Raftery, JASA 2007, section 4.3 (the energy score, by its unbiased estimate).
    """
    rng = np.random.default_rng(seed)
    count, outputs = y.shape
    marginal = MarginalForecast(regressor)
    periods, scales = regressor.target_.periods, marginal.points.std(0).clip(1e-12)
    draws = regressor.sample(table, JOINT_SAMPLES, random_state=int(rng.integers(2**31)))
    levels = []
    for start in range(0, count, 256):
        rows = slice(start, start + 256)
        p = regressor.predict_distribution(table.iloc[rows])
        own = p.log_prob(torch.as_tensor(y[rows])).double().cpu().numpy()
        others = p.log_prob(torch.as_tensor(np.moveaxis(draws[rows], 1, 0).copy())).double().cpu().numpy()
        # Among the target and S exchangeable draws its rank is uniform; the noise spreads it between the ranks.
        levels.append(((others > own).sum(0) + rng.random(len(own))) / (JOINT_SAMPLES + 1))
    points = [
        marginal.points[rng.integers(0, MARGINAL_POINTS, (count, JOINT_SAMPLES)), d] for d in range(outputs)
    ]  # fmt: skip

    def score(samples: Array, level: Array | None = None) -> JointScores:
        return JointScores(_energy_scores(_embed(samples, periods, scales), _embed(y, periods, scales)), level)

    line = None if linear is None else score(linear.sample(table, JOINT_SAMPLES, rng))
    return score(draws, np.concatenate(levels)), score(np.stack(points, -1)), line


def _embed(y: Array, periods: Sequence[float], scales: Array) -> Array:
    """Outputs in comparable units, shape (..., D) to (..., E); an angle as a point on the circle of its period."""
    columns = []
    for d, period in enumerate(periods):
        if not period:
            columns.append(y[..., d] / scales[d])
            continue
        angle = 2 * math.pi / period * y[..., d]
        columns += [np.cos(angle), np.sin(angle)]
    return np.stack(columns, -1)


def _energy_scores(samples: Array, y: Array) -> Array:
    """E|Y − y| − ½ E|Y − Y'| from S draws, (B, S, E) and (B, E) to (B,), without bias."""
    count = samples.shape[1]
    score = np.linalg.norm(samples - y[:, None], axis=-1).mean(1)
    for shift in range(1, count):
        score -= 0.5 * np.linalg.norm(samples - np.roll(samples, shift, 1), axis=-1).mean(1) / (count - 1)
    return score

"""Scores of a fitted estimator on rows that it has not seen, beside a constant forecast, in bounded memory.

The constant forecast is the marginal distribution of the training targets, the same for every row: what is known
without any x. A model that does not beat it has learned nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from energyreg.estimator import EnergyRegressor

__all__ = ["LEVELS", "Evaluation", "MarginalForecast", "RowScores", "evaluate", "permutation_importance"]

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Probabilities of the intervals that are scored."""
QUANTILES = 128
"""Levels of the midpoint rule for the CRPS."""
MARGINAL_POINTS = 8_192
"""Equally probable points that stand for the marginal distribution."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RowScores:
    """Scores of B rows of one forecast.

    Attributes:
        nll: −log p of the observed target (all outputs jointly), in nats and the units of y, shape (B,).
        crps: Continuous ranked probability score, shape (B, D).
        error: Mean minus target; along the shorter way on a circle, shape (B, D).
        median_error: The same of the median (on a circle, of the mean), shape (B, D).
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
    """Scores of the model and of the constant forecast on the same rows."""

    model: RowScores
    marginal: RowScores

    @property
    def rows(self) -> int:
        """How many rows there were."""
        return len(self.model.nll)


class MarginalForecast:
    """The marginal distribution of the training targets that a fitted estimator holds, as a constant forecast.

    Args:
        regressor: The estimator, fitted.
    """

    def __init__(self, regressor: EnergyRegressor) -> None:
        model = regressor.model_
        member: Any = getattr(model, "members", [model])[0]
        self.regressor, self.space = regressor, model.space
        self.reference = getattr(member.base, "reference", member.base)
        self.outputs = regressor.n_outputs_
        levels = (torch.arange(MARGINAL_POINTS, dtype=torch.double) + 0.5) / MARGINAL_POINTS
        with torch.no_grad():
            z = self.reference.from_unit(levels[:, None].expand(-1, self.outputs).to(self._dtype))
            self.points = np.sort(self.space.to_user(z).double().cpu().numpy(), axis=0)
        self.mean = np.array([_mean(self.points[:, d], period) for d, period in enumerate(_periods(regressor))])

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
            result = torch.where(self.space.contains(target), result, -math.inf).numpy()
            if step is None:
                return result
            low, high = cells(self.regressor, y)
            mass = (self._cdf(high) - self._cdf(low))[:, 0]
        total = 1.0 - float(self._cdf(np.full((1, 1), -0.5))[0, 0]) if self.regressor.target == "count" else 1.0
        with np.errstate(divide="ignore"):
            return np.where(mass > 1e-6, np.log(mass / total / (high - low)[:, 0]), result - math.log(total))

    def _cdf(self, y: Array) -> Array:
        return self.reference.to_unit(self.space.to_model(torch.as_tensor(y)).to(self._dtype)).double().numpy()

    def pit(self, y: Array) -> Array:
        """Probability below each target, counted from the lower end of a circle, shape (B, D)."""
        columns = [np.searchsorted(self.points[:, d], y[:, d]) / len(self.points) for d in range(self.outputs)]
        return np.stack(columns, 1)


def evaluate(
    regressor: EnergyRegressor,
    chunks: Iterable[tuple[Any, Array]],
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Score an estimator on rows that come in chunks.

    Args:
        regressor: The estimator, fitted.
        chunks: Pairs of a table X and its targets, shape (B, D).
        seed: Seed of the noise by which targets on a lattice get a uniform PIT.
        progress: Called with the rows of each chunk when it is done.

    Returns:
        Scores by row.

    Raises:
        ValueError: If a chunk does not fit the estimator.
    """
    marginal = MarginalForecast(regressor)
    rng = np.random.default_rng(seed)
    parts: list[tuple[RowScores, RowScores]] = []
    for table, targets in chunks:
        parts.append(_score(regressor, marginal, table, np.array(targets, dtype=np.float64), rng))
        progress(len(targets))
    return Evaluation(RowScores.join([model for model, _ in parts]), RowScores.join([other for _, other in parts]))


def _score(
    regressor: EnergyRegressor, marginal: MarginalForecast, table: Any, y: Array, rng: np.random.Generator
) -> tuple[RowScores, RowScores]:
    rows, outputs = y.shape
    tails = [(1 - level) / 2 for level in LEVELS]
    middles = [(i + 0.5) / QUANTILES for i in range(QUANTILES)]
    levels = [*middles, 0.5, *tails, *(1 - tail for tail in tails)]
    within = y if regressor.lattice_step_ is None else rng.uniform(*cells(regressor, y))
    periods = _periods(regressor)

    quantiles = regressor.predict_quantiles(table, levels).reshape(rows, len(levels), outputs)
    ends = quantiles[:, QUANTILES + 1 :].reshape(rows, 2, len(LEVELS), outputs)
    low, high = ends[:, 0], ends[:, 1]
    if hasattr(regressor, "conformal_intervals_") or any(periods):
        intervals = [regressor.predict_interval(table, level).reshape(rows, outputs, 2) for level in LEVELS]
        low, high = np.moveaxis(np.stack(intervals, 1), -1, 0)
    if outputs == 1:
        pit = regressor.predict_distribution(table).cdf(torch.as_tensor(within)).double().cpu().numpy()[:, None]
    else:
        pit = np.stack(
            [[np.interp(v, q, middles) for v, q in zip(y[:, d], quantiles[:, :QUANTILES, d], strict=True)]
             for d in range(outputs)], 1,
        )  # fmt: skip
    mean = regressor.predict(table).reshape(rows, outputs)
    own = _rows(
        y, periods, -regressor.score_samples(table, y), quantiles[:, : QUANTILES + 1], mean, low, high, pit.clip(0, 1)
    )

    constant = np.broadcast_to(marginal.quantiles(levels), (rows, len(levels), outputs))
    ends = constant[:, QUANTILES + 1 :].reshape(rows, 2, len(LEVELS), outputs)
    other = _rows(
        y, periods, -marginal.log_density(y), constant[:, : QUANTILES + 1], np.broadcast_to(marginal.mean, y.shape),
        ends[:, 0], ends[:, 1], marginal.pit(within),
    )  # fmt: skip
    return own, other


def _rows(
    y: Array, periods: Sequence[float], nll: Array, quantiles: Array, mean: Array, low: Array, high: Array, pit: Array
) -> RowScores:
    """Scores from the quantiles (B, QUANTILES + 1, D), the last the median, and the ends of the intervals (B, L, D)."""
    tau = ((np.arange(QUANTILES) + 0.5) / QUANTILES)[:, None]
    below = y[:, None] - quantiles[:, :QUANTILES]
    crps = 2 * np.maximum(tau * below, (tau - 1) * below).mean(1)
    error, median_error = mean - y, quantiles[:, QUANTILES] - y
    offset, width = y[:, None] - low, high - low
    for d, period in enumerate(periods):
        if period:  # a median there depends on where the circle is cut; the mean direction does not
            error[:, d] = (error[:, d] + period / 2) % period - period / 2
            median_error[:, d] = error[:, d]
            offset[..., d] %= period
    inside = ((offset >= 0) & (offset <= width)).astype(np.float64)
    return RowScores(nll, crps, error, median_error, inside, width, pit)


def cells(regressor: EnergyRegressor, y: Array) -> tuple[Array, Array]:
    """Ends of the rounding of targets on a lattice, within the target space, shape (B, 1) each."""
    half = (regressor.lattice_step_ or 0.0) / 2
    low, high = y - half, y + half
    target = regressor.target[0] if isinstance(regressor.target, list) else regressor.target
    if target == "positive":
        low = np.maximum(low, y / 2)
    elif isinstance(target, tuple):
        low, high = np.maximum(low, target[1]), np.minimum(high, target[2])
    return low, high


def permutation_importance(
    regressor: EnergyRegressor, table: Any, y: Array, *, seed: int = 0, progress: Callable[[int], None] = lambda n: None
) -> dict[str, tuple[float, float]]:
    """How much log-density the model loses where one column is shuffled, which cuts its tie to y.

    Args:
        regressor: The estimator, fitted on a table with column names.
        table: pandas frame of B rows.
        y: Their targets, shape (B, D).
        seed: Seed of the shuffling.
        progress: Called with 1 after each column.

    Returns:
        Column → mean loss in nats and its standard error over the rows, the largest first. Columns that tell the same
        share their importance, and may all seem unimportant.
    """
    before = regressor.score_samples(table, y)
    rng = np.random.default_rng(seed)
    result = {}
    for name in table.columns:
        order = rng.permutation(len(table))
        shuffled = table.assign(**{name: table[name].to_numpy()[order]})
        shuffled[name] = shuffled[name].astype(table[name].dtype)
        loss = before - regressor.score_samples(shuffled, y)
        loss = loss[np.isfinite(loss)]
        result[str(name)] = float(loss.mean()), float(loss.std() / math.sqrt(max(len(loss), 1)))
        progress(1)
    return dict(sorted(result.items(), key=lambda item: -item[1][0]))


def _periods(regressor: EnergyRegressor) -> list[float]:
    """The period of each output; 0 for what does not start anew."""
    given = regressor.target
    kinds = given if isinstance(given, list) else [given] * regressor.n_outputs_
    circles = [isinstance(kind, tuple) and kind[0] == "circle" for kind in kinds]
    return [float(kind[2] - kind[1]) if circle else 0.0 for kind, circle in zip(kinds, circles, strict=True)]


def _mean(points: Array, period: float) -> float:
    if not period:
        return float(points.mean())
    angle = 2 * math.pi / period * points
    return float(math.atan2(np.sin(angle).mean(), np.cos(angle).mean()) * period / (2 * math.pi))

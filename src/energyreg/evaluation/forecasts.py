"""Scores of a fitted estimator on rows that it has not seen, beside those of simple forecasts, in bounded memory.

The constant forecast is the marginal distribution of the training targets, the same for every row: what is known
without any x. A model that does not beat it has learned nothing. The linear forecast is a Gaussian of constant width
around a linear function of the inputs. A model that does not beat that one has found neither curves nor shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from energyreg.models.chain import EnergyChain

if TYPE_CHECKING:
    from energyreg.estimators.table import EnergyRegressor

__all__ = [
    "LEVELS",
    "Evaluation",
    "JointScores",
    "LinearForecast",
    "MarginalForecast",
    "RowScores",
    "circular_crps",
    "evaluate",
    "evaluate_jointly",
    "evaluate_linear",
    "permutation_importance",
]

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Probabilities of the intervals that are scored."""
QUANTILES = 128
"""Levels of the midpoint rule for the CRPS."""
MARGINAL_POINTS = 8_192
"""Equally probable points that stand for the marginal distribution."""
BLOCK_ROWS = 512
"""Rows that are scored at once: few enough that a predictive distribution keeps what it has computed."""
JOINT_SAMPLES = 128
"""Draws per row for the scores of several outputs together."""
RIDGE = 1e-3
"""Penalty of the linear forecast, as a share of the variance of its inputs: it decides among collinear columns only."""
DIRECTIONS, ROWS_PER_DIRECTION = 32, 10
"""So many columns are taken as they are; of more, as many principal directions as there are rows for."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class RowScores:
    """Scores of B rows of one forecast.

    Attributes:
        nll: −log p of the observed target (all outputs jointly), in nats and the units of y, shape (B,).
        crps: Continuous ranked probability score, on a circle that of :func:`circular_crps`, shape (B, D).
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


def _reference(model: Any) -> Any:
    """The reference measure of a model, an ensemble or a chain."""
    if isinstance(model, EnergyChain):
        return model.reference
    base = getattr(model, "members", [model])[0].base
    return getattr(base, "reference", base)


class MarginalForecast:
    """The marginal distribution of the training targets that a fitted estimator holds, as a constant forecast.

    Args:
        regressor: The estimator, fitted.
    """

    def __init__(self, regressor: EnergyRegressor) -> None:
        self.regressor, self.space = regressor, regressor.model_.space
        self.reference = _reference(regressor.model_)
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
            log_p: Array = torch.where(self.space.contains(target), result, -math.inf).numpy()
            if step is None:
                return log_p
            low, high = cells(self.regressor, y)
            mass = (self._cdf(high) - self._cdf(low))[:, 0]
        total = 1.0 - float(self._cdf(np.full((1, 1), -0.5))[0, 0]) if self.regressor.target == "count" else 1.0
        with np.errstate(divide="ignore"):
            return np.where(mass > 1e-6, np.log(mass / total / (high - low)[:, 0]), log_p - math.log(total))

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
    levels = _all_levels()
    within = y if regressor.lattice_step_ is None else rng.uniform(*cells(regressor, y))
    periods = _periods(regressor)
    own = []
    for start in range(0, rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        part = table.iloc[block] if hasattr(table, "iloc") else table[block]
        own.append(_score_model(regressor, part, y[block], within[block], levels, periods))
    constant = np.broadcast_to(marginal.quantiles(levels), (rows, len(levels), outputs))
    ends = constant[:, QUANTILES + 1 :].reshape(rows, 2, len(LEVELS), outputs)
    other = _rows(
        y, periods, -marginal.log_density(y), constant[:, : QUANTILES + 1], np.broadcast_to(marginal.mean, y.shape),
        ends[:, 0], ends[:, 1], marginal.pit(within),
    )  # fmt: skip
    return RowScores.join(own), other


def _all_levels() -> list[float]:
    """Levels of the quantiles that all scores are made of: for the CRPS, the median, lower ends, upper ends."""
    tails = [(1 - level) / 2 for level in LEVELS]
    return [*((i + 0.5) / QUANTILES for i in range(QUANTILES)), 0.5, *tails, *(1 - tail for tail in tails)]


def _score_model(
    regressor: EnergyRegressor, table: Any, y: Array, within: Array, levels: Sequence[float], periods: Sequence[float]
) -> RowScores:
    """Scores of one block of rows, from one predictive distribution, which keeps its points for the next question."""
    rows, outputs = y.shape
    p = regressor.predict_distribution(table)
    counts = regressor.target == "count"

    def numbers(values: torch.Tensor) -> Array:
        return values.double().cpu().numpy()

    def whole(values: Array) -> Array:  # as `EnergyRegressor.predict_quantiles` has it
        return np.maximum(np.floor(values + 0.5), 0.0) if counts else values

    if outputs == 1:
        quantiles = numbers(p.quantile(torch.tensor(levels, dtype=torch.double))).T[..., None]
        pit = numbers(p.cdf(torch.as_tensor(within)))[:, None]
    else:
        quantiles = np.moveaxis(numbers(p.central_quantiles(list(levels))), 0, 1)
        middles = levels[:QUANTILES]
        pit = np.stack(
            [[np.interp(v, q, middles) for v, q in zip(y[:, d], quantiles[:, :QUANTILES, d], strict=True)]
             for d in range(outputs)], 1,
        )  # fmt: skip
    quantiles = whole(quantiles)
    ends = quantiles[:, QUANTILES + 1 :].reshape(rows, 2, len(LEVELS), outputs)
    low, high = ends[:, 0], ends[:, 1]
    if hasattr(regressor, "conformal_intervals_"):
        intervals = [regressor.predict_interval(table, level).reshape(rows, outputs, 2) for level in LEVELS]
        low, high = np.moveaxis(np.stack(intervals, 1), -1, 0)
    elif any(periods) and outputs == 1:  # the quantiles count from where the circle is cut, intervals from the mean
        tails = sorted(levels[QUANTILES + 1 :])  # rising: arcs begin at the first
        central = whole(np.moveaxis(numbers(p.central_quantiles(tails)), 0, 1))
        wanted = np.argsort(np.argsort(levels[QUANTILES + 1 :]))
        low, high = central[:, wanted[: len(LEVELS)]], central[:, wanted[len(LEVELS) :]]
    mean = numbers(p.mean).reshape(rows, outputs)
    mean = np.maximum(mean, 0.0) if counts else mean
    nll = -regressor._log_density(p, y)
    return _rows(y, periods, nll, quantiles[:, : QUANTILES + 1], mean, low, high, pit.clip(0, 1))


def _rows(
    y: Array, periods: Sequence[float], nll: Array, quantiles: Array, mean: Array, low: Array, high: Array, pit: Array
) -> RowScores:
    """Scores from the quantiles (B, QUANTILES + 1, D), the last the median, and the ends of the intervals (B, L, D)."""
    tau = ((np.arange(QUANTILES) + 0.5) / QUANTILES)[:, None]
    below = y[:, None] - quantiles[:, :QUANTILES]
    crps = 2 * np.maximum(tau * below, (tau - 1) * below).mean(1)
    for d, period in enumerate(periods):
        if period:
            crps[:, d] = circular_crps(quantiles[:, :QUANTILES, d], y[:, d], period)
    error, median_error = mean - y, quantiles[:, QUANTILES] - y
    offset, width = y[:, None] - low, high - low
    for d, period in enumerate(periods):
        if period:  # a median there depends on where the circle is cut; the mean direction does not
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


class LinearForecast:
    """A Gaussian of constant width around a linear function of the inputs, in the estimator's target space.

    Positive targets are linear in their logarithm, bounded ones in their logit. An angle's mean direction is that of
    two linear functions, for its cosine and its sine, and its noise is a Gaussian wrapped around the circle. Several
    outputs have a joint Gaussian. Categories count by themselves (one-hot). Of more columns
    than the rows can tell apart, as of a network's features, the directions in which these differ most are taken.

    Args:
        regressor: The estimator, fitted; its inputs and target space are taken, nothing of its network.
        table: Rows to fit to, at least 3.
        y: Their targets, shape (B, D).
    """

    def __init__(self, regressor: EnergyRegressor, table: Any, y: Array) -> None:
        self.regressor, self.space, self.periods = regressor, regressor.model_.space, _periods(regressor)
        self.circles = np.array([period > 0 for period in self.periods])
        x, z = self._design(table), self._to_model(y)
        self.centre = x.mean(0)
        x = x - self.centre
        most = max(len(x) // ROWS_PER_DIRECTION, DIRECTIONS)
        self.directions: Array | None = None
        if x.shape[1] > most:
            self.directions = np.linalg.eigh(x.T @ x)[1][:, -most:]
            x = x @ self.directions
        parts = np.concatenate([np.where(self.circles, np.cos(z), z), np.sin(z[:, self.circles])], 1)
        self.middle = parts.mean(0)
        gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
        self.weights = np.linalg.solve(gram, x.T @ (parts - self.middle))
        residual = self._residual(z, self.location(table))
        # Degrees of freedom as the penalty leaves them, never more than half the rows.
        used = min(1 + float(np.trace(np.linalg.solve(gram, x.T @ x))), len(x) / 2)
        self.covariance = residual.T @ residual / (len(x) - used) + 1e-12 * np.eye(z.shape[1])
        self.scale = np.sqrt(np.diag(self.covariance))

    def _design(self, table: Any) -> Array:
        x = self.regressor._inputs(table).astype(np.float64)
        sizes = self.regressor.preprocessor_.cardinalities_
        numbers = x.shape[1] - len(sizes)
        codes = x[:, numbers:].astype(int)
        columns = [codes[:, [i]] == np.arange(size) for i, size in enumerate(sizes)]
        return np.concatenate([x[:, :numbers], *columns], 1).astype(np.float64)

    def _to_model(self, y: Array) -> Array:
        return self.space.to_model(torch.as_tensor(y)).double().cpu().numpy()

    def _to_user(self, z: Array) -> Array:
        return self.space.to_user(torch.as_tensor(z)).double().cpu().numpy()

    def _residual(self, z: Array, location: Array) -> Array:
        difference = z - location
        return np.where(self.circles, (difference + math.pi) % (2 * math.pi) - math.pi, difference)

    def location(self, table: Any) -> Array:
        """The linear function of each row, in the target space, shape (B, D)."""
        x = self._design(table) - self.centre
        parts = (x if self.directions is None else x @ self.directions) @ self.weights + self.middle
        location, count = parts[:, : len(self.circles)], len(self.circles)
        location[:, self.circles] = np.arctan2(parts[:, count:], location[:, self.circles])
        return location

    def log_density(self, table: Any, y: Array) -> Array:
        """Log-density of targets (B, D), shape (B,), counted as `EnergyRegressor.score_samples` counts it."""
        location = self.location(table)
        if self.regressor.lattice_step_ is not None:
            low, high = cells(self.regressor, y)
            ends = []
            for end, beyond in ((low, -np.inf), (high, np.inf)):  # a bound of the space is its end
                inside = self.space.contains(torch.as_tensor(end)).cpu().numpy()
                z = (self._to_model(end)[:, 0] - location[:, 0]) / self.scale[0]
                ends.append(np.where(inside, z, beyond))
            if self.regressor.target == "count":
                below = (self._to_model(np.full_like(y, -0.5))[:, 0] - location[:, 0]) / self.scale[0]
                return _log_normal_mass(*ends) - _log_normal_mass(below, np.full_like(below, np.inf))
            return _log_normal_mass(*ends) - np.log(high - low)[:, 0]
        residual = self._residual(self._to_model(y), location)
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

    def sample(self, table: Any, count: int, rng: np.random.Generator) -> Array:
        """Draws in user units, shape (B, count, D)."""
        location = self.location(table)
        noise = rng.standard_normal((len(location), count, len(self.circles)))
        return self._to_user(location[:, None] + noise @ np.linalg.cholesky(self.covariance).T)


def _log_normal_mass(low: Array, high: Array) -> Array:
    """Log-probability of a standard normal between two ends, exact in both tails."""
    flip = low > 0  # by symmetry both ends lie below or around 0, where log Φ keeps its digits
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    upper, lower = (torch.special.log_ndtr(torch.as_tensor(end)).numpy() for end in (high, low))
    with np.errstate(divide="ignore"):
        return upper + np.log(-np.expm1(np.minimum(lower - upper, 0.0)))


def evaluate_linear(
    regressor: EnergyRegressor, table: Any, y: Array, *, folds: int = 5, seed: int = 0
) -> tuple[RowScores, list[tuple[NDArray[np.int64], LinearForecast]]]:
    """Scores of :class:`LinearForecast`, each row predicted by one that was fitted to the other folds of the table.

    A model file keeps no training rows, so the rows at hand are split, at random, into folds.

    Args:
        regressor: The estimator, fitted.
        table: pandas frame of B rows.
        y: Their targets, shape (B, D).
        folds: How many parts, at most B // 2.
        seed: Seed of the split.

    Returns:
        Scores by row, and for each fold its rows and the forecast that predicts them.

    Raises:
        ValueError: If there are fewer than 8 rows.
    """
    if len(y) < 8:
        raise ValueError(f"table has {len(y)} rows; expected at least 8 to fit a line to some and score the others.")
    periods = _periods(regressor)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    levels = _all_levels()
    within = y if regressor.lattice_step_ is None else rng.uniform(*cells(regressor, y))
    parts, forecasts = [], []
    for held in np.array_split(order, min(folds, len(y) // 2)):
        kept = np.setdiff1d(order, held)
        forecast = LinearForecast(regressor, table.iloc[kept], y[kept])
        forecasts.append((held, forecast))
        rows = table.iloc[held]
        quantiles = forecast.quantiles(rows, levels)
        if regressor.target == "count":
            quantiles = np.maximum(np.floor(quantiles + 0.5), 0.0)
        ends = quantiles[:, QUANTILES + 1 :].reshape(len(held), 2, len(LEVELS), -1)
        z = forecast._residual(forecast._to_model(within[held]), forecast.location(rows)) / forecast.scale
        pit = torch.special.ndtr(torch.as_tensor(z)).numpy()
        mean = quantiles[:, :QUANTILES].mean(1)
        parts.append(
            _rows(
                y[held], periods, -forecast.log_density(rows, y[held]), quantiles[:, : QUANTILES + 1], mean,
                ends[:, 0], ends[:, 1], pit,
            )
        )  # fmt: skip
    joined = RowScores.join(parts)
    back = np.argsort(order)
    return RowScores(**{name: getattr(joined, name)[back] for name in RowScores.__annotations__}), forecasts


@dataclass(frozen=True)
class JointScores:
    """Scores of B rows of one forecast of several outputs together.

    Attributes:
        energy_score: The CRPS of several dimensions, over standardised outputs (angles as points on a circle), (B,).
        level: Probability of the smallest region that holds the target (up to the draws it is estimated from),
            uniform for a calibrated forecast, shape (B,); None where densities of draws are not to be had.
    """

    energy_score: Array
    level: Array | None


def evaluate_jointly(
    regressor: EnergyRegressor,
    table: Any,
    y: Array,
    linear: Sequence[tuple[NDArray[np.int64], LinearForecast]] = (),
    *,
    seed: int = 0,
) -> tuple[JointScores, JointScores, JointScores | None]:
    """Scores of several outputs together: of the model, of the marginals as if independent, and of the linear forecast.

    Args:
        regressor: The estimator, fitted to D > 1 outputs.
        table: pandas frame of B rows.
        y: Their targets, shape (B, D).
        linear: Rows and their forecasts, from :func:`evaluate_linear`; none leaves the last part out.
        seed: Seed of the draws.

    Returns:
        The scores of the three.

    Source:
        Gneiting and Raftery, JASA 2007, section 4.3 (the energy score, by its unbiased estimate).
    """
    rng = np.random.default_rng(seed)
    count, outputs = y.shape
    marginal = MarginalForecast(regressor)
    periods, scales = _periods(regressor), marginal.points.std(0).clip(1e-12)
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

    line = None
    if linear:
        samples = np.empty((count, JOINT_SAMPLES, outputs))
        for held, forecast in linear:
            held = held[held < count]
            if len(held):
                samples[held] = forecast.sample(table.iloc[held], JOINT_SAMPLES, rng)
        line = score(samples)
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

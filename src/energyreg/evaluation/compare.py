"""Scores of a fitted estimator on rows that it has not seen, beside those of simple forecasts, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from energyreg.estimators.members import integrator_of, weights_of
from energyreg.estimators.settings import threads
from energyreg.evaluation.forecasts import LinearForecast, MarginalForecast
from energyreg.evaluation.scores import (
    ALL_LEVELS,
    LEVELS,
    MIDPOINTS,
    QUANTILES,
    TAILS,
    Array,
    Evaluation,
    RowScores,
    score_quantiles,
)
from energyreg.models.ensemble import EnergyEnsemble

if TYPE_CHECKING:
    from energyreg.estimators.core import DensityRegressor

__all__ = ["evaluate", "evaluate_linear", "permutation_importance"]

SCREENING_ROWS = 150
"""Rows of the first look at the columns of a wide table."""
IMPORTANCE_BLOCK = 4_096
BLOCK_ROWS = 512
"""Rows that are scored at once: few enough that a predictive distribution keeps what it has computed."""


def evaluate(
    regressor: DensityRegressor,
    chunks: Iterable[tuple[Any, Array]],
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Score an estimator on rows that come in chunks.

    Args:
        regressor: The estimator, fitted.
        chunks: Pairs of a table X and its targets, shape (B, D).
        seed: Seed of the noise by which rounded targets get a uniform PIT.
        progress: Called with the rows of each chunk when it is done.

    Returns:
        Scores by row.

    Raises:
        ValueError: If a chunk does not fit the estimator.
    """
    marginal = MarginalForecast(regressor)
    linear = None if regressor.linear_baseline_ is None else LinearForecast(regressor)
    rng = np.random.default_rng(seed)
    parts: list[list[RowScores]] = []
    for table, targets in chunks:
        y = np.array(targets, dtype=np.float64)
        within = _within_rounding(regressor, y, rng)
        parts.append([_score_blocks(regressor, table, y, within), _score_marginal(marginal, y, within)])
        if linear is not None:
            parts[-1].append(_score_linear(linear, table, y, within))
        progress(len(y))
    return Evaluation(*map(RowScores.join, zip(*parts, strict=True)))


def _score_blocks(regressor: DensityRegressor, table: Any, y: Array, within: Array) -> RowScores:
    """Scores of the model, block by block."""
    rows, periods, own = len(y), regressor.target_.periods, []
    for start in range(0, rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        part = table.iloc[block] if hasattr(table, "iloc") else table[block]
        own.append(_score_model(regressor, part, y[block], within[block], periods))
    return RowScores.join(own)


def _score_marginal(marginal: MarginalForecast, y: Array, within: Array) -> RowScores:
    constant = np.broadcast_to(marginal.quantiles(ALL_LEVELS), (len(y), len(ALL_LEVELS), y.shape[1]))
    return score_quantiles(
        y, constant, nll=-marginal.log_density(y), mean=np.broadcast_to(marginal.mean, y.shape),
        pit=marginal.pit(within), periods=marginal.regressor.target_.periods,
    )  # fmt: skip


def _score_linear(linear: LinearForecast, table: Any, y: Array, within: Array) -> RowScores:
    quantiles = linear.regressor.target_.round(linear.quantiles(table, ALL_LEVELS))
    return score_quantiles(
        y, quantiles, nll=-linear.log_density(table, y), mean=quantiles[:, :QUANTILES].mean(1),
        pit=linear.pit(table, within), periods=linear.periods,
    )  # fmt: skip


def _within_rounding(regressor: DensityRegressor, y: Array, rng: np.random.Generator) -> Array:
    """The targets, each drawn from the values that round to it where the estimator takes them as rounded."""
    return y if regressor.lattice_step_ is None else rng.uniform(*regressor.target_.bins(y, regressor.lattice_step_))


def _score_model(
    regressor: DensityRegressor, table: Any, y: Array, within: Array, periods: Sequence[float]
) -> RowScores:
    """Scores of one block of rows, from one predictive distribution, which keeps its points for the next question."""
    rows, outputs = y.shape
    p = regressor.predict_distribution(table)
    if outputs == 1:
        quantiles = _numbers(p.quantile(torch.tensor(ALL_LEVELS, dtype=torch.double))).T[..., None]
        pit = _numbers(p.cdf(torch.as_tensor(within)))[:, None]
    else:
        quantiles = np.moveaxis(_numbers(p.central_quantiles(list(ALL_LEVELS))), 0, 1)
        pit = np.stack(
            [[np.interp(v, q, MIDPOINTS) for v, q in zip(y[:, d], quantiles[:, :QUANTILES, d], strict=True)]
             for d in range(outputs)], 1,
        )  # fmt: skip
    intervals = None
    if hasattr(regressor, "conformal_intervals_"):
        found = [regressor.predict_interval(table, level).reshape(rows, outputs, 2) for level in LEVELS]
        low, high = np.moveaxis(np.stack(found, 1), -1, 0)
        intervals = low, high
    elif any(periods) and outputs == 1:  # the quantiles count from where the circle is cut, intervals from the mean
        rising = np.moveaxis(_numbers(p.central_quantiles(sorted(TAILS))), 0, 1)  # as arcs begin at the first
        central = regressor.target_.round(rising)
        wanted = np.argsort(np.argsort(TAILS))
        intervals = central[:, wanted[: len(LEVELS)]], central[:, wanted[len(LEVELS) :]]
    mean = _numbers(p.mean).reshape(rows, outputs)
    return score_quantiles(
        y, regressor.target_.round(quantiles), nll=-regressor.log_density(p, y), mean=regressor.target_.clip(mean),
        pit=pit.clip(0, 1), periods=periods, intervals=intervals,
    )  # fmt: skip


def _numbers(values: torch.Tensor) -> Array:
    return values.double().cpu().numpy()


def evaluate_linear(regressor: DensityRegressor, table: Any, y: Array, *, seed: int = 0) -> RowScores:
    """Scores of the :class:`LinearForecast` that was fitted to the estimator's training rows.

    Args:
        regressor: The estimator, fitted.
        table: pandas frame of B rows.
        y: Their targets, shape (B, D).
        seed: Seed of the noise by which rounded targets get a uniform PIT.

    Returns:
        Scores by row.

    Raises:
        ValueError: If the estimator keeps no linear baseline, as those of version 0.1.
    """
    forecast = LinearForecast(regressor)
    return _score_linear(forecast, table, y, _within_rounding(regressor, y, np.random.default_rng(seed)))


def permutation_importance(
    regressor: DensityRegressor,
    table: Any,
    y: Array,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda n: None,
    most: int | None = None,
) -> dict[str, tuple[float, float]]:
    """How much log-density the model loses where one column is shuffled, which cuts its tie to y.

    Args:
        regressor: The estimator, fitted on a table with column names.
        table: pandas frame of B rows.
        y: Their targets, shape (B, D).
        seed: Seed of the shuffling.
        progress: Called with 1 after each column; of more than `most`, after each of these, and after the first look.
        most: Columns that are looked at by all rows; None for all. Of more, a first look at `SCREENING_ROWS` rows, by
            the heaviest member of an ensemble, chooses them, and the others keep what was found by it.

    Returns:
        Column → mean loss in nats and its standard error over the rows, the largest first; columns of the first look
        only come after the others. Columns that tell the same share their importance, and may all seem unimportant.
    """
    y = np.array(y, dtype=np.float64)  # torch warns of what pandas holds read-only
    x, names = regressor.encode(table), [str(name) for name in table.columns]
    sources = regressor.preprocessor_.sources_
    parts = {name: [at for at, source in enumerate(sources) if source == i] for i, name in enumerate(names)}

    def losses(columns: Sequence[str], model: Any, rows: int, calibrated: bool) -> dict[str, tuple[float, float]]:
        known, targets, rng = x[:rows], y[:rows], np.random.default_rng(seed)

        def log_densities(inputs: Array) -> Array:
            found = []
            for start in range(0, len(inputs), IMPORTANCE_BLOCK):
                block = slice(start, start + IMPORTANCE_BLOCK)
                p = model(inputs[block], integrator=integrator_of(model))
                found.append(regressor.log_density(regressor.calibration_(p) if calibrated else p, targets[block]))
            return np.concatenate(found)

        before, result = log_densities(known), {}
        for name in columns:
            shuffled, order = known.copy(), rng.permutation(len(known))
            shuffled[:, parts[name]] = known[order][:, parts[name]]
            loss = before - log_densities(shuffled) if parts[name] else np.zeros(1)
            loss = loss[np.isfinite(loss)]
            result[name] = float(loss.mean()), float(loss.std() / math.sqrt(max(len(loss), 1)))
            if calibrated:
                progress(1)
        return dict(sorted(result.items(), key=lambda item: -item[1][0]))

    first: dict[str, tuple[float, float]] = {}
    model = regressor.model_
    with threads(regressor.n_jobs):
        if most is not None and len(names) > most:
            heaviest = int(np.argmax(weights_of(model)))
            one = model.members[heaviest] if isinstance(model, EnergyEnsemble) else model
            first = losses(names, one, SCREENING_ROWS, calibrated=False)
            progress(1)
        chosen = list(first or names)[: most or len(names)]
        found = losses(chosen, model, len(x), calibrated=True)
    return found | {name: first[name] for name in list(first)[len(chosen) :]}

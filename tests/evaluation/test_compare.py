"""Scores of an estimator are those of its own methods, and no row is predicted from itself."""

import math

import numpy as np
import pytest

pytest.importorskip("pandas")
pytest.importorskip("sklearn")
stats = pytest.importorskip("scipy.stats")

from energyreg.evaluation import LEVELS, evaluate, evaluate_linear  # noqa: E402
from tests.fitted import KINDS, fitted, rows, targets  # noqa: E402


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_predicted_from_itself(kind):
    table, y = rows(60, seed=5)
    y = targets(kind, y).reshape(60, -1)
    scores, forecasts = evaluate_linear(fitted(kind), table, y, seed=0)
    assert sorted(np.concatenate([held for held, _ in forecasts])) == list(range(60))
    changed = y.copy()
    changed[7] = y[8]
    again, _ = evaluate_linear(fitted(kind), table, changed, seed=0)
    np.testing.assert_allclose(again.width[7], scores.width[7])  # its own target moved nothing of its forecast
    assert not np.allclose(again.width, scores.width)
    assert np.isfinite(scores.nll).all() and scores.crps.shape == y.shape


def test_linear_forecast_is_calibrated_where_the_truth_is_linear():
    table, y = rows(1_000, seed=6)
    scores, _ = evaluate_linear(fitted("real"), table, y[:, None])
    # The largest distance of 1,000 uniform values from their level stays below 1.63/√1,000 in 99 of 100 samples.
    assert stats.kstest(scores.pit[:, 0], "uniform").statistic < 1.63 / math.sqrt(1_000)
    assert scores.inside[:, LEVELS.index(0.9)].mean() == pytest.approx(0.9, abs=3 * math.sqrt(0.09 / 1_000))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_model_are_those_of_the_estimator(kind):
    table, y = rows(40, seed=7)
    y = targets(kind, y).reshape(40, -1)
    regressor = fitted(kind)
    scores = evaluate(regressor, [(table, y)]).model
    np.testing.assert_allclose(scores.nll, -regressor.score_samples(table, y), rtol=1e-4, atol=1e-4)
    ends = regressor.predict_interval(table, 0.9).reshape(40, -1, 2)
    width = ends[..., 1] - ends[..., 0]
    np.testing.assert_allclose(scores.width[:, LEVELS.index(0.9)], width, rtol=1e-3, atol=1e-3)
    mean = regressor.predict(table).reshape(40, -1)
    difference = scores.error - (mean - y)
    if kind == "circle":
        difference = (difference + 180) % 360 - 180
    np.testing.assert_allclose(difference, 0, atol=1e-3)

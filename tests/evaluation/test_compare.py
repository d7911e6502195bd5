"""Scores of an estimator are those of its own methods, and baselines are those of the training rows."""

import copy
import math

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")
stats = pytest.importorskip("scipy.stats")

from energyreg.estimators.table import EnergyRegressor  # noqa: E402
from energyreg.evaluation import LEVELS, LinearForecast, evaluate, evaluate_linear, permutation_importance  # noqa: E402
from tests.fitted import KINDS, fitted, rows, targets  # noqa: E402


@pytest.mark.parametrize("kind", KINDS)
def test_the_baseline_learns_nothing_from_the_rows_that_are_scored(kind):
    table, y = rows(60, seed=5)
    y = targets(kind, y).reshape(60, -1)
    scores = evaluate_linear(fitted(kind), table, y, seed=0)
    assert np.isfinite(scores.nll).all() and scores.crps.shape == y.shape
    changed = y.copy()
    changed[7] = y[8]
    again = evaluate_linear(fitted(kind), table, changed, seed=0)
    np.testing.assert_array_equal(again.width, scores.width)
    np.testing.assert_array_equal(np.delete(again.nll, 7), np.delete(scores.nll, 7))
    few = evaluate_linear(fitted(kind), table[:2], y[:2], seed=0)  # nor does it need many of them
    np.testing.assert_allclose(few.nll, scores.nll[:2])


def test_the_baseline_is_ridge_regression_on_the_training_rows():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6))
    y = x @ [3.0, -2.0, 1.0, 0.0, 0.0, 0.5] + rng.normal(size=400)
    regressor = EnergyRegressor(n_members=1, epochs=1, width=8, validation_fraction=0, random_state=0)
    regressor.fit(x[:200], y[:200])
    inside = np.clip(x, x[:200].min(0), x[:200].max(0))  # as the estimator's own inputs are
    ridge = linear_model.RidgeCV(np.logspace(-6, 4, 41)).fit(x[:200], y[:200])
    scale = np.sqrt(((y[:200] - ridge.predict(x[:200])) ** 2).sum() / (200 - 7))
    expected = -stats.norm.logpdf(y[200:], ridge.predict(inside[200:]), scale).mean()
    assert evaluate_linear(regressor, x[200:], y[200:, None]).nll.mean() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_baseline_is_stored_with_the_model(kind, tmp_path):
    table, y = rows(20, seed=6)
    y = targets(kind, y).reshape(20, -1)
    loaded = EnergyRegressor.load(fitted(kind).save(tmp_path / "m"))
    scores, again = (evaluate_linear(regressor, table, y) for regressor in (fitted(kind), loaded))
    np.testing.assert_allclose(again.nll, scores.nll, rtol=1e-6)


def test_an_estimator_of_an_older_version_has_no_linear_baseline():
    state = fitted("real").state()
    del state["linear_baseline"]
    old = EnergyRegressor.from_state(copy.deepcopy(fitted("real").model_), state)
    table, y = rows(20, seed=6)
    with pytest.raises(ValueError, match="keeps no linear baseline: it was saved by an older version"):
        evaluate_linear(old, table, y[:, None])


def test_linear_forecast_is_calibrated_where_the_truth_is_linear():
    known, seen = rows(1_000, seed=16)
    forecast = LinearForecast(fitted("real"), known, seen[:, None])
    table, y = rows(1_000, seed=6)
    # The largest distance of 1,000 uniform values from their level stays below 1.63/√1,000 in 99 of 100 samples.
    assert stats.kstest(forecast.pit(table, y[:, None])[:, 0], "uniform").statistic < 1.63 / math.sqrt(1_000)
    low, high = forecast.quantiles(table, [0.05, 0.95])[..., 0].T
    assert ((low <= y) & (y <= high)).mean() == pytest.approx(0.9, abs=3 * math.sqrt(0.09 / 1_000))


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


@pytest.mark.parametrize("kind", ["real", "count", "two"])
def test_importance_is_what_shuffling_a_column_costs(kind):
    table, y = rows(40, seed=8)
    y, regressor = targets(kind, y).reshape(40, -1), fitted(kind)
    steps = []
    found = permutation_importance(regressor, table, y, seed=3, progress=steps.append)
    assert sum(steps) == 3 and list(found) == sorted(found, key=lambda name: -found[name][0])
    rng = np.random.default_rng(3)
    before = regressor.score_samples(table, y)
    for name in table.columns:
        shuffled = table.assign(**{name: table[name].to_numpy()[rng.permutation(40)]})
        loss = before - regressor.score_samples(shuffled, y)
        assert found[name][0] == pytest.approx(loss.mean(), rel=1e-3, abs=1e-3)


def test_a_wide_table_is_looked_at_first_and_its_best_columns_again():
    rng = np.random.default_rng(0)
    x = pd.DataFrame(rng.normal(size=(400, 30)), columns=[f"x{i}" for i in range(30)]).assign(same=1.0)
    y = 3 * x["x7"] + 2 * x["x20"] + 0.3 * rng.normal(size=400)
    regressor = EnergyRegressor(n_members=2, epochs=8, width=16, random_state=0)
    with pytest.warns(UserWarning, match="same"):
        regressor.fit(x, y)
    steps = []
    found = permutation_importance(regressor, x[:60], y[:60].to_numpy()[:, None], progress=steps.append, most=4)
    assert sum(steps) == 5 and len(found) == 31 and list(found)[:2] == ["x7", "x20"]
    assert found["same"] == (0.0, 0.0)

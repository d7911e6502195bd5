"""Columns are what the estimator says of the rows, whatever is asked for together, and wherever the function runs."""

import pickle
from functools import partial

import numpy as np
import pytest

pytest.importorskip("sklearn")

from energyreg.estimators.table import EnergyRegressor
from energyreg.scoring.columns import Asked, predict_columns, sample_columns

SETTINGS = {"n_members": 1, "epochs": 1, "width": 8, "random_state": 0}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2))


@pytest.fixture(scope="module", params=[1, 2], ids=["one output", "two outputs"])
def fitted(request):
    y = X @ RNG.normal(size=(2, request.param)) + 0.1 * RNG.normal(size=(60, request.param))
    return EnergyRegressor(**SETTINGS).fit(X, y[:, 0] if request.param == 1 else y), y


def test_columns_are_the_estimators_after_a_round_trip_by_pickle(fitted):
    regressor, y = fitted
    outputs = ("a", "b") if y.shape[1] == 2 else ()
    asked = Asked(("mode", "mean"), (0.5, 0.9), (0.1, 0.25), True, samples=2, outputs=outputs)
    run = pickle.loads(pickle.dumps(partial(predict_columns, regressor, asked=asked, random_state=3)))
    columns = run(x=X[:7], y=y[:7])
    names = ["mode", "mean", "lower_50", "upper_50", "lower_90", "upper_90", "quantile_0.1", "quantile_0.25"]
    names += ["sample_1", "sample_2"]
    labels = [f"{name}_" for name in outputs] or [""]
    assert list(columns) == [label + name for label in labels for name in names] + ["log_density"]
    assert all(column.shape == (7,) for column in columns.values())
    for d, label in enumerate(labels):
        expected = {
            "mode": regressor.predict(X[:7], kind="mode"),
            "upper_90": regressor.predict_interval(X[:7], 0.9)[..., 1],
            "quantile_0.1": regressor.predict_quantiles(X[:7], [0.1, 0.25])[:, 0],
            "sample_2": regressor.sample(X[:7], 2, random_state=3)[:, 1],
        }
        for name, values in expected.items():
            np.testing.assert_array_equal(columns[label + name], values.reshape(7, -1)[:, d])
    np.testing.assert_array_equal(columns["log_density"], regressor.score_samples(X[:7], y[:7]))


def test_draws_are_long_and_blocks_join(fitted):
    regressor, y = fitted
    whole = sample_columns(regressor, X[:6], 3, first_row=5, random_state=1)
    assert list(whole) == ["row", "draw", *(["y"] if y.shape[1] == 1 else ["y1", "y2"])]
    assert whole["row"].tolist()[2:4] == [5, 6] and whole["draw"].tolist()[2:4] == [3, 1]
    draws = regressor.sample(X[:6], 3, random_state=1).reshape(18, -1)
    np.testing.assert_array_equal(np.stack(list(whole.values())[2:], 1), draws)
    parts = [predict_columns(regressor, X[rows], Asked()) for rows in (slice(0, 4), slice(4, 9))]
    for name, column in predict_columns(regressor, X[:9], Asked()).items():
        np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), column, rtol=1e-4, atol=1e-5)


def test_probabilities_of_counts():
    regressor = EnergyRegressor(**SETTINGS, target="count").fit(X, RNG.poisson(2.0, 60))
    columns = predict_columns(regressor, X[:5], Asked((), (), probabilities=(0, 3)))
    assert list(columns) == ["probability_0", "probability_3"]
    expected = regressor.predict_probabilities(X[:5], [0, 3])
    np.testing.assert_array_equal(np.stack(list(columns.values()), 1), expected)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"points": ("best",)}, "points has 'best'; expected some of 'mean'"),
        ({"intervals": (90,)}, "intervals has 90; expected probabilities between 0 and 1"),
        ({"quantiles": (0.0,)}, "quantiles has 0.0"),
        ({"samples": -1}, "samples is -1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        Asked(**asked)


def test_names_must_be_as_many_as_the_outputs(fitted):
    regressor, y = fitted
    with pytest.raises(ValueError, match=f"outputs names 3 columns, but the estimator predicts {y.shape[1]}"):
        sample_columns(regressor, X, 1, ["a", "b", "c"])

"""The linear baseline is ridge regression, whatever the rows are like, and a file of it is checked."""

import math

import numpy as np
import pytest

pytest.importorskip("sklearn")

from energyreg.estimators import linear
from energyreg.estimators.linear import LinearGaussian
from tests.fitted import fitted


def data(count=300, seed=0):
    rng = np.random.default_rng(seed)
    x = np.column_stack([rng.normal(size=(count, 3)), rng.integers(0, 3, count)])
    z = x[:, :3] @ [[1.0], [-2.0], [0.0]] + 2.0 * (x[:, 3:] == 1) + 0.5 * rng.normal(size=(count, 1))
    return x, z


def test_finds_lines_and_levels():
    x, z = data()
    found = LinearGaussian.fit(x, z, cardinalities=[3])
    new, truth = data(seed=1)
    error = truth - found.location(new)
    # Noise of 0.5 (known to 4% from 300 rows), and 6 weights from 300 rows: another 1%.
    assert error.std() == pytest.approx(0.5, rel=0.12) and found.covariance[0, 0] == pytest.approx(0.25, rel=0.2)


def test_a_row_of_weight_two_is_there_twice_and_one_of_weight_nought_not_at_all():
    x, z = data(60)
    weights = np.repeat([2.0, 1.0], 30)
    weighted = LinearGaussian.fit(x, z, cardinalities=[3], weights=weights)
    twice = LinearGaussian.fit(np.vstack([x[:30], x]), np.vstack([z[:30], z]), cardinalities=[3])
    np.testing.assert_allclose(weighted.location(x), twice.location(x), atol=0.02)


def test_angles_go_around():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (400, 1))
    truth = math.pi + 1.2 * x
    angle = (truth + 0.1 * rng.normal(size=truth.shape) + math.pi) % (2 * math.pi) - math.pi
    found = LinearGaussian.fit(x, angle, circles=[True])
    assert np.abs(found.residual(truth, found.location(x))).max() < 0.3


def test_targets_at_an_infinite_end_count_as_the_outermost():
    x, z = data(50)
    z[3], z[9] = np.inf, -np.inf
    assert np.isfinite(LinearGaussian.fit(x, z, cardinalities=[3]).location(x)).all()


def test_more_columns_and_rows_than_are_fitted_to(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2_000, 40))
    z = 3 * x[:, [33]] + rng.normal(size=(2_000, 1))
    monkeypatch.setattr(linear, "MOST_COLUMNS", 5)
    monkeypatch.setattr(linear, "MOST_ROWS", 1_000)
    found = LinearGaussian.fit(x, z)
    assert found.rows == 1_000 and (found.weights != 0).sum() == 5
    assert found.weights[33, 0] == pytest.approx(3, abs=0.15)  # of 1,000 rows: 0.03 a standard error


def test_a_line_never_leaves_the_targets_far_behind():
    x, z = data()
    found = LinearGaussian.fit(x, z, cardinalities=[3])
    far = found.location(np.array([[1e6, 0.0, 0.0, 0.0]]))
    assert far[0, 0] == pytest.approx(z.max() + 0.25 * np.ptp(z), rel=1e-6)


@pytest.mark.parametrize("features", [0, 3])
def test_few_rows_or_columns_do(features):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 2))
    found = LinearGaussian.fit(rng.normal(size=(3, features)), z)
    assert np.isfinite(found.location(np.zeros((2, features)))).all() and np.linalg.eigvalsh(found.covariance).min() > 0
    with pytest.raises(ValueError, match="2 rows; expected at least 3"):
        LinearGaussian.fit(np.zeros((2, features)), z[:2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", [[0.0]]),
        ("offset", [float("nan")]),
        ("covariance", [[-1.0]]),
        ("circles", [False, False]),
        ("cardinalities", [10**9]),
        ("weights", "x"),
        ("rows", None),
        ("ends", [[[]]]),
    ],
)
def test_a_damaged_baseline_is_refused(name, value):
    state = fitted("real").linear_baseline_.state()
    sizes = state["cardinalities"]
    LinearGaussian.from_state(state, 4, sizes, 1)
    with pytest.raises(ValueError, match=r"linear.baseline"):
        LinearGaussian.from_state(state | {name: value}, 4, sizes, 1)

"""Scores of several outputs together agree with independent ones."""

import math

import numpy as np
import pytest

pytest.importorskip("pandas")
pytest.importorskip("sklearn")
stats = pytest.importorskip("scipy.stats")

from energyreg.evaluation import MarginalForecast, evaluate_jointly, joint  # noqa: E402
from tests.fitted import fitted, rows, targets  # noqa: E402


def test_energy_score_is_that_of_the_metrics():
    table, y = rows(30, seed=8)
    both = targets("two", y)
    regressor = fitted("two")
    model, marginal, line = evaluate_jointly(regressor, table, both, seed=1)
    assert line is None and marginal.level is None
    scoringrules = pytest.importorskip("scoringrules")
    rng = np.random.default_rng(1)
    draws = regressor.sample(table, joint.JOINT_SAMPLES, random_state=int(rng.integers(2**31)))
    scale = MarginalForecast(regressor).points.std(0)
    expected = scoringrules.es_ensemble(both / scale, draws / scale, m_axis=-2, v_axis=-1, estimator="fair")
    np.testing.assert_allclose(model.energy_score, expected, rtol=1e-6)


def test_joint_levels_of_targets_drawn_from_the_model_are_uniform():
    table, _ = rows(60, seed=9)
    drawn = fitted("two").sample(table, 1, random_state=3)[:, 0]
    model, _, _ = evaluate_jointly(fitted("two"), table, drawn, seed=2)
    assert stats.kstest(model.level, "uniform").pvalue > 0.001


def test_angles_are_far_apart_by_the_circle_in_the_energy_score():
    embedded = joint._embed(np.array([[1.0, 359.0], [1.0, 1.0]]), [0.0, 360.0], np.array([2.0, 1.0]))
    assert embedded.shape == (2, 3)
    assert np.linalg.norm(embedded[0] - embedded[1]) == pytest.approx(2 * math.sin(math.radians(1)))

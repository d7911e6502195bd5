"""Scores of rows agree with closed forms."""

import math

import numpy as np
import pytest

from energyreg.evaluation import circular_crps

stats = pytest.importorskip("scipy.stats")


def test_circular_crps_is_the_expectation_over_all_pairs_and_knows_no_cut():
    rng = np.random.default_rng(0)
    points, y = rng.uniform(0, 24, (5, 30)), rng.uniform(0, 24, 5)

    def arc(a, b):
        return np.abs((a - b + 12) % 24 - 12)

    pairs = arc(points[:, :, None], points[:, None, :]).mean((1, 2))
    expected = arc(points, y[:, None]).mean(1) - 0.5 * pairs
    np.testing.assert_allclose(circular_crps(points, y, 24.0), expected, rtol=1e-12)
    np.testing.assert_allclose(circular_crps((points + 7) % 24, (y + 7) % 24, 24.0), expected, rtol=1e-9)


def test_circular_crps_of_a_narrow_forecast_is_that_on_the_line():
    levels = (np.arange(128) + 0.5) / 128
    points = 100 + 5 * stats.norm.ppf(levels)[None]
    y = 107.0
    z = (y - 100) / 5
    closed = 5 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    assert circular_crps(points, np.array([y]), 360.0)[0] == pytest.approx(closed, rel=0.01)

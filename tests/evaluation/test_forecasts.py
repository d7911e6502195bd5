"""The simple forecasts are the distributions that they claim to be."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("pandas")
pytest.importorskip("sklearn")
stats = pytest.importorskip("scipy.stats")

from energyreg.densities.spaces import Real  # noqa: E402
from energyreg.estimators.table import EnergyRegressor  # noqa: E402
from energyreg.evaluation import LinearForecast, forecasts  # noqa: E402
from energyreg.models.chain import EnergyChain  # noqa: E402
from tests.fitted import fitted, rows, targets  # noqa: E402


@pytest.mark.parametrize("kind", ["real", "positive", "circle"])
def test_linear_density_integrates_to_one(kind):
    table, y = rows(300, seed=1)
    forecast = LinearForecast(fitted(kind), table, targets(kind, y)[:, None])
    ends = {"real": (-40, 40), "positive": (1e-6, 400), "circle": (0, 360)}[kind]
    grid = np.linspace(*ends, 200_001) if kind != "positive" else np.geomspace(*ends, 200_001)
    for row in (0, 7):
        density = np.exp(forecast.log_density(table.iloc[[row] * len(grid)], grid[:, None]))
        assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)


def test_linear_forecast_is_least_squares_with_gaussian_noise():
    table, y = rows(400, seed=2)
    table[["x", "w"]] = table[["x", "w"]].fillna(0.0).clip(-1, 1)  # a missing or extreme value is coded otherwise
    forecast = LinearForecast(fitted("real"), table, y[:, None])
    x = np.column_stack([np.ones(400), table["x"], table["w"], table["group"] == "a", table["group"] == "b"])
    solution, rest, *_ = np.linalg.lstsq(x.astype(float), y, rcond=None)
    mean, scale = x.astype(float) @ solution, math.sqrt(rest[0] * 400) / (400 - 5)  # on new rows, by cross-validation
    new = y[::-1].copy()
    expected = stats.norm.logpdf(new, mean, scale)
    # The penalty and the rounding of the features to float32 move the line by little.
    np.testing.assert_allclose(forecast.log_density(table, new[:, None]), expected, atol=0.05, rtol=0.01)
    quantiles = forecast.quantiles(table, [0.05, 0.5])[..., 0]
    np.testing.assert_allclose(quantiles, mean[:, None] + scale * stats.norm.ppf([0.05, 0.5]), atol=0.05)


def test_linear_forecast_of_two_outputs_is_a_joint_gaussian():
    table, y = rows(200, seed=3)
    both = targets("two", y)
    forecast = LinearForecast(fitted("two"), table, both)
    space = fitted("two").model_.space
    location = forecast.location(table)
    z = space.to_model(torch.as_tensor(both)).numpy()
    jacobian = space.log_abs_det_jacobian(torch.as_tensor(both)).numpy()
    for row in (0, 50):
        expected = stats.multivariate_normal.logpdf(z[row], location[row], forecast.covariance) + jacobian[row]
        assert forecast.log_density(table, both)[row] == pytest.approx(expected, rel=1e-9)
    draws = forecast.sample(table.iloc[:1], 40_000, np.random.default_rng(0))[0]
    drawn = np.cov(space.to_model(torch.as_tensor(draws)).numpy().T)
    np.testing.assert_allclose(drawn, forecast.covariance, rtol=0.05, atol=0.02)  # 1/√40,000 is 0.5%


def test_linear_forecast_of_more_columns_than_rows_keeps_its_noise():
    # One direction of 300 columns tells y; the noise of the target has a variance of 1.
    rng = np.random.default_rng(0)
    factor = rng.normal(size=500)
    x = factor[:, None] + 0.1 * rng.normal(size=(500, 300))
    y = 2 * factor[:, None] + rng.normal(size=(500, 1))
    regressor = EnergyRegressor(n_members=1, epochs=1, width=8, random_state=0).fit(x[:60], y[:60, 0])
    forecast = LinearForecast(regressor, x[:100], y[:100])
    nll = -forecast.log_density(x[100:], y[100:]).mean()
    assert nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=0.3)


def test_linear_probabilities_of_counts_sum_to_one():
    table, y = rows(200, seed=4)
    forecast = LinearForecast(fitted("count"), table, targets("count", y)[:, None])
    values = np.arange(0.0, 60.0)
    assert np.exp(forecast.log_density(table.iloc[[5] * 60], values[:, None])).sum() == pytest.approx(1, abs=1e-9)


def test_normal_mass_is_exact_in_both_tails():
    low, high = np.array([-40.0, -1.0, 0.5, 39.0]), np.array([-39.0, 1.0, 0.6, 40.0])
    expected = [
        stats.norm.logcdf(-39), math.log(stats.norm.cdf(1) - stats.norm.cdf(-1)),
        math.log(stats.norm.cdf(0.6) - stats.norm.cdf(0.5)), stats.norm.logcdf(-39),
    ]  # fmt: skip
    np.testing.assert_allclose(forecasts._log_normal_mass(low, high), expected, rtol=1e-9)


def test_marginals_of_a_chain_are_in_the_order_of_the_outputs():
    chain = EnergyChain.for_table(1, Real(2), order=[1, 0], width=4)
    for scale, part in zip((2.0, 3.0), chain.factors, strict=True):
        part.base.fit(scale * torch.randn(200, 1, generator=torch.Generator().manual_seed(0)))
    z = torch.tensor([[1.0, 10.0]])
    second, first = (part.base for part in chain.factors)
    expected = first.log_prob(z[:, :1]) + second.log_prob(z[:, 1:])
    reference = forecasts.reference_of(chain)
    assert torch.equal(reference.log_prob(z), expected)
    assert not torch.equal(reference.log_prob(z.flip(-1)), expected)

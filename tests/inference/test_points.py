"""Laws of weighted points: moments, quantiles and draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from energyreg.inference.points import WeightedPoints


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def _importance_sample(num_points: int, num_rows: int, seed: int = 0) -> WeightedPoints:
    """f = 3 - y²/2, so log Z = 3 + log √2π, from the wider q = N(0, 1.5²)."""
    y = 1.5 * _randn(num_points, num_rows, 1, seed=seed)
    log_q = torch.distributions.Normal(0, 1.5).log_prob(y[..., 0])
    return WeightedPoints(y, 3 - y[..., 0].square() / 2 - log_q - math.log(num_points))


LOG_PARTITION = 3 + math.log(2 * math.pi) / 2


def test_log_partition_and_its_standard_error() -> None:
    # The mean of 2000 standardised errors has a standard deviation of 0.022, their spread one of 0.016: four of these,
    # and the bias of order 1 / M of log Z and of its error.
    points = _importance_sample(1000, 2000)
    errors = (points.log_partition - LOG_PARTITION) / points.log_partition_stderr
    assert errors.mean().abs() < 0.1
    assert errors.std().item() == pytest.approx(1, abs=0.08)


def test_standard_error_of_ordered_nodes_bounds_the_error_of_a_converging_rule() -> None:
    for num_nodes in (10, 20, 40):
        y = -8 + 16 * (torch.arange(num_nodes, dtype=torch.float64) + 0.3) / num_nodes
        log_weights = 3 - y.square() / 2 + math.log(16 / num_nodes)
        points = WeightedPoints(y[:, None, None], log_weights[:, None], independent=False)
        error = (points.log_partition - LOG_PARTITION).abs()
        assert error <= points.log_partition_stderr + 1e-12
    assert error < 1e-9


def test_gradient_of_log_partition_is_the_normalised_weights() -> None:
    log_weights = _randn(30, 4).requires_grad_()
    points = WeightedPoints(_randn(30, 4, 2), log_weights)
    (gradient,) = torch.autograd.grad(points.log_partition.sum(), log_weights)
    torch.testing.assert_close(gradient, points.log_normalised_weights.exp())
    torch.testing.assert_close(gradient.sum(0), torch.ones(4, dtype=torch.float64))


@settings(deadline=None)
@given(m=st.integers(1, 300), shift=st.floats(-1e4, 1e4), spread=st.floats(0, 50))
def test_effective_sample_size_lies_between_one_and_all(m: int, shift: float, spread: float) -> None:
    log_weights = spread * _randn(m, 3)
    size = WeightedPoints(torch.zeros(m, 1, 1), log_weights + shift).effective_sample_size
    assert (size >= 1 - 1e-9).all()
    assert (size <= m * (1 + 1e-9)).all()
    unshifted = WeightedPoints(torch.zeros(m, 1, 1), log_weights).effective_sample_size
    torch.testing.assert_close(size, unshifted, rtol=1e-6, atol=0)


def test_effective_sample_size_of_equal_and_of_degenerate_weights() -> None:
    log_weights = torch.zeros(50, 2)
    log_weights[1:, 1] = -math.inf
    size = WeightedPoints(torch.zeros(50, 1, 1), log_weights).effective_sample_size
    torch.testing.assert_close(size, torch.tensor([50.0, 1.0]))


def test_expectation_is_self_normalised() -> None:
    # Each mean has a standard error of about 1 / √(effective sample size) = 0.0035; four of these, for y² with √2 more.
    points = _importance_sample(100_000, 2)
    assert points.expectation().shape == (2, 1)
    assert points.expectation().abs().max() < 4 * 0.0035
    assert (points.expectation(torch.square) - 1).abs().max() < 4 * 0.005
    torch.testing.assert_close(
        points.expectation(lambda y: torch.ones(y.shape[:2])), torch.ones(2, dtype=torch.float64)
    )


def test_points_shared_by_the_rows_are_points_of_every_row() -> None:
    y, log_weights, levels = _randn(40, 1, 3), _randn(40, 5, seed=1), torch.rand(7, 5, generator=_generator())
    shared, own = WeightedPoints(y, log_weights), WeightedPoints(y.expand(-1, 5, -1), log_weights)
    assert torch.equal(shared.expectation(), own.expectation())
    assert torch.equal(shared.quantiles(levels), own.quantiles(levels))
    assert torch.equal(shared.resample(9, generator=_generator()), own.resample(9, generator=_generator()))
    assert shared.resample(9).shape == (9, 5, 3)
    assert shared.quantiles(levels).shape == (7, 5, 3)


def test_resampling_follows_the_weights() -> None:
    # Each frequency in N draws has a standard deviation of at most √(w / N); five of these for 12 frequencies.
    num_samples = 40_000
    weights = torch.tensor([[0.0, 0.1, 0.4, 0.0, 0.5, 0.0], [0.3, 0.3, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64).T
    y = torch.arange(6.0)[:, None, None]
    points = WeightedPoints(y, weights.log() - 700)
    samples = points.resample(num_samples, generator=_generator())
    assert torch.equal(samples, points.resample(num_samples, generator=_generator()))
    frequencies = (samples == y[:, 0, 0]).double().mean(0).T
    assert ((frequencies - weights).abs() <= 5 * (weights / num_samples).sqrt()).all()


def test_points_without_weight_are_never_drawn() -> None:
    log_weights = torch.full((6, 1), -math.inf, dtype=torch.float64)
    log_weights[[2, 4]] = 0
    last = torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(0.0, dtype=torch.float64)).item()
    uniforms = torch.tensor([0.0, 0.25, 0.5, 0.75, last], dtype=torch.float64)[:, None]
    index = WeightedPoints(torch.zeros(6, 1, 1), log_weights).indices_at(uniforms)
    assert index[:, 0].tolist() == [2, 2, 4, 4, 4]


@settings(deadline=None)
@given(m=st.integers(1, 40), rows=st.integers(1, 3), dim=st.integers(1, 3), seed=st.integers(0, 99))
def test_quantiles_of_equal_weights_are_those_of_numpy(m: int, rows: int, dim: int, seed: int) -> None:
    y = _randn(m, rows, dim, seed=seed)
    levels = (torch.arange(m, dtype=torch.float64) + 0.5) / m  # clear of the steps at multiples of 1 / m
    result = WeightedPoints(y, torch.full((m, rows), -3.0)).quantiles(levels[:, None].expand(-1, rows))
    np.testing.assert_array_equal(result, np.quantile(y, levels, axis=0, method="inverted_cdf"))


def test_quantiles_of_weighted_points() -> None:
    y = torch.tensor([3.0, 1.0, 2.0])[:, None, None]
    points = WeightedPoints(y, torch.tensor([0.2, 0.5, 0.3]).log()[:, None])
    levels = torch.tensor([0.0, 0.4, 0.6, 0.79, 0.9, 1.0])[:, None]
    assert points.quantiles(levels).flatten().tolist() == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("y_shape", "weights_shape"),
    [((5, 2, 1), (4, 2)), ((5, 3, 1), (5, 2)), ((5, 2), (5, 2)), ((5, 2, 1), (5,)), ((5, 2, 1), (5, 2, 1))],
)
def test_shapes_that_disagree(y_shape: tuple[int, ...], weights_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"y has shape \(5.*and log_weights \(.*expected \(M, B, D\)"):
        WeightedPoints(torch.zeros(y_shape), torch.zeros(weights_shape))


@settings(deadline=None)
@given(m=st.integers(1, 60), num_samples=st.integers(1, 200), spread=st.floats(0, 5), seed=st.integers(0, 99))
def test_systematic_resampling_draws_each_point_as_often_as_its_weight_says(
    m: int, num_samples: int, spread: float, seed: int
) -> None:
    points = WeightedPoints(torch.arange(float(m))[:, None, None], spread * _randn(m, 3, seed=seed) - 500)
    samples = points.resample(num_samples, systematic=True, generator=_generator(seed))
    counts = (samples[:, None, :, 0] == torch.arange(float(m))[:, None]).sum(0)
    # Rounding may decide a level that falls between two points.
    assert ((counts - num_samples * points.log_normalised_weights.exp()).abs() < 1 + 1e-9).all()


def test_systematic_resampling_is_unbiased_and_in_random_order() -> None:
    # 4000 rows of the same weights. The frequency of a point in a given draw has a standard deviation of at most
    # √(w (1 - w) / 4000) = 0.0079; four and a half of these, for the 5 points of 7 draws.
    weights = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3], dtype=torch.float64)
    points = WeightedPoints(torch.arange(5.0)[:, None, None], weights.log()[:, None].expand(-1, 4000))
    samples = points.resample(7, systematic=True, generator=_generator())
    assert samples.shape == (7, 4000, 1)
    assert torch.equal(samples, points.resample(7, systematic=True, generator=_generator()))
    frequencies = (samples == torch.arange(5.0)).double().mean(1)
    assert ((frequencies - weights).abs() < 4.5 * 0.0079).all()
    # The number of draws of a point is spread less than that of independent draws.
    count = (samples == 1).double().sum(0).var()
    assert count < 0.25 < 7 * 0.4 * 0.6


def test_pareto_smoothing_lowers_the_error_of_log_z_for_heavy_weights() -> None:
    # Samples of a normal of half the scale: k = 0.75, where the raw weights have no variance. 4000 repetitions know a
    # mean absolute error to 2 %.
    y = 0.5 * _randn(400, 4000, 1)
    log_q = torch.distributions.Normal(0, 0.5).log_prob(y[..., 0])
    points = WeightedPoints(y, 3 - y[..., 0].square() / 2 - log_q - math.log(400))
    raw, smooth = points.log_partition - LOG_PARTITION, points.pareto_smoothed().log_partition - LOG_PARTITION
    assert smooth.abs().mean() < 0.95 * raw.abs().mean()
    assert smooth.square().mean() < 0.95 * raw.square().mean()
    # And does no harm where the proposal covers the density.
    points = _importance_sample(400, 2000)
    raw, smooth = points.log_partition - LOG_PARTITION, points.pareto_smoothed().log_partition - LOG_PARTITION
    assert smooth.square().mean() < 1.1 * raw.square().mean()

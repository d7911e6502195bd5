"""Laws of weighted points, of cells, and of the Pareto shape."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from energyreg.inference.cells import Cells
from energyreg.inference.pareto import pareto_k
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


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.0, 2.0])
def test_pareto_k_recovers_the_shape_of_a_pareto_tail(k: float) -> None:
    # U^-k has a tail of shape k. The tail has 949 weights, and the estimate a standard error of (1 + k) / √949.
    uniform = torch.rand(100_000, 8, generator=_generator(), dtype=torch.float64)
    estimate = pareto_k(-k * uniform.log())
    assert (estimate - k).abs().max() < 4 * (1 + k) / math.sqrt(949)


def test_pareto_k_of_a_proposal_that_covers_and_of_one_that_does_not() -> None:
    # Weights p / q of normals of scale 1 and s < 1 have k = 1 - s², approached from below. Those of s > 1 end at
    # y = 0, as a square, which is k = -2. The standard error for 190 weights in the tail is 0.14, of the median 0.04.
    for scale, least, most in ((1.5, -2.1, -1.4), (0.3, 0.7, 1.1)):
        y = scale * _randn(4000, 20)
        log_weights = -y.square() / 2 + y.square() / (2 * scale**2)
        assert least < pareto_k(log_weights).median() < most


def test_pareto_k_does_not_depend_on_scale_order_or_the_other_columns() -> None:
    log_weights = 2 * _randn(500, 3)
    k = pareto_k(log_weights)
    torch.testing.assert_close(pareto_k(log_weights + 12.0), k, rtol=1e-9, atol=1e-9)
    assert torch.equal(pareto_k(log_weights.flip(0)), k)
    torch.testing.assert_close(pareto_k(log_weights[:, 1:2]), k[1:2])
    assert torch.equal(WeightedPoints(torch.zeros(500, 1, 1), log_weights).pareto_k, k)
    float32 = pareto_k(log_weights.float())
    assert float32.dtype == torch.float32
    torch.testing.assert_close(float32.double(), k, rtol=1e-4, atol=1e-4)


def test_pareto_k_at_the_limits() -> None:
    assert pareto_k(torch.zeros(100, 1)).item() == 0
    assert pareto_k(torch.randn(10, 1, generator=_generator())).isnan().all()
    # A range beyond that of exp, and points of no weight, are not to be trusted, which is no NaN.
    assert (pareto_k(1000 * _randn(1000, 5)) > 1).all()
    log_weights = _randn(1000, 1)
    log_weights[50:] = -math.inf
    assert pareto_k(log_weights).item() > 1


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


def _smoothed_by_the_book(log_weights: np.ndarray) -> np.ndarray:
    """One row, in the steps of Vehtari et al. 2024 and of the R package loo."""
    m = len(log_weights)
    shifted = log_weights - log_weights.max()
    order = np.argsort(shifted)
    length = math.ceil(min(0.2 * m, 3 * math.sqrt(m)))
    tail, threshold = order[-length:], math.exp(shifted[order[-length - 1]])
    x = np.exp(shifted[tail]) - threshold
    # Zhang and Stephens's fit, a value of theta at a time.
    size = 30 + math.floor(math.sqrt(length))
    quartile = x[math.floor(length / 4 + 0.5) - 1]
    theta = [1 / x[-1] + (1 - math.sqrt(size / (j - 0.5))) / (3 * quartile) for j in range(1, size + 1)]
    profile = []
    for value in theta:
        k = np.log1p(-value * x).mean()
        profile.append(length * (math.log(-value / k) - k - 1))
    weights = [1 / sum(math.exp(other - one) for other in profile) for one in profile]
    mean = sum(w * value for w, value in zip(weights, theta, strict=True))
    k = np.log1p(-mean * x).mean()
    sigma = -k / mean
    k = (length * k + 10 * 0.5) / (length + 10)
    for rank, index in enumerate(tail):
        p = (rank + 0.5) / length
        shifted[index] = min(math.log(threshold + sigma * ((1 - p) ** -k - 1) / k), 0.0)
    return shifted + log_weights.max()


@pytest.mark.parametrize(("m", "scale"), [(25, 1.0), (100, 0.3), (101, 2.0), (1000, 1.0), (1000, 5.0)])
def test_pareto_smoothing_is_that_of_its_authors(m: int, scale: float) -> None:
    log_weights = scale * _randn(m, 4) + 100
    points = WeightedPoints(_randn(m, 1, 2), log_weights)
    smoothed = points.pareto_smoothed()
    expected = np.stack([_smoothed_by_the_book(row.copy()) for row in log_weights.T.numpy()], 1)
    np.testing.assert_allclose(smoothed.log_weights, expected, rtol=1e-11)
    assert smoothed.y is points.y
    assert smoothed.independent


@settings(deadline=None)
@given(m=st.integers(25, 300), spread=st.floats(0.01, 30), seed=st.integers(0, 99))
def test_pareto_smoothing_keeps_the_order_the_bulk_and_the_largest_weight_as_a_bound(
    m: int, spread: float, seed: int
) -> None:
    raw = spread * _randn(m, 2, seed=seed)
    smoothed = WeightedPoints(torch.zeros(m, 1, 1), raw).pareto_smoothed().log_weights
    tail = math.ceil(min(0.2 * m, 3 * math.sqrt(m)))
    order = raw.argsort(0)
    assert (smoothed.gather(0, order).diff(dim=0) >= 0).all()
    assert torch.equal(smoothed.gather(0, order)[:-tail], raw.gather(0, order)[:-tail])
    assert (smoothed <= raw.amax(0)).all()
    float32 = WeightedPoints(torch.zeros(m, 1, 1), raw.float()).pareto_smoothed().log_weights
    assert float32.dtype == torch.float32
    torch.testing.assert_close(float32.double(), smoothed, rtol=1e-3, atol=1e-3)


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


def test_pareto_smoothing_leaves_alone_what_has_no_tail() -> None:
    for raw in (torch.full((100, 2), -7.0), _randn(24, 2), torch.full((100, 2), -math.inf)):
        assert torch.equal(WeightedPoints(torch.zeros(len(raw), 1, 1), raw).pareto_smoothed().log_weights, raw)
    # Rows by themselves: one with equal weights beside one with a tail; and a point without weight gets none.
    raw = torch.stack([torch.zeros(100, dtype=torch.float64), 3 * _randn(100), 3 * _randn(100)], 1)
    raw[:85, 2] = -math.inf
    smoothed = WeightedPoints(torch.zeros(100, 1, 1), raw.requires_grad_()).pareto_smoothed().log_weights
    assert not smoothed.requires_grad
    assert torch.equal(smoothed[:, 0], raw[:, 0])
    assert (smoothed[:, 1] != raw[:, 1]).sum() == 19  # of 20: the largest is cut to what it was
    assert (smoothed[:85, 2] == -math.inf).all()
    assert smoothed[85:, 2].isfinite().all()


def _cells(num_rows: int = 3, shared: bool = True) -> Cells:
    shape = (20,) if shared else (20, num_rows)
    widths = torch.rand(shape, generator=_generator(), dtype=torch.float64) + 0.1
    widths = widths / widths.sum(0)
    edges = torch.cat([torch.zeros_like(widths[:1]), widths.cumsum(0)])
    edges[-1] = 1
    return Cells(edges, (edges[1:] + edges[:-1]) / 2, 2 * _randn(20, num_rows))


@pytest.mark.parametrize("shared", [True, False])
def test_cells_cdf_is_the_sum_of_the_masses_before(shared: bool) -> None:
    cells = _cells(shared=shared)
    torch.testing.assert_close(cells.masses.sum(0), torch.ones(3, dtype=torch.float64))
    edges = cells.edges[:, None].expand(-1, 3) if shared else cells.edges
    cdf = cells.unit_cdf(edges)
    torch.testing.assert_close(cdf.diff(dim=0), cells.masses, rtol=1e-9, atol=1e-12)
    assert (cdf[0] == 0).all()
    torch.testing.assert_close(cdf[-1], torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        cells.log_widths.exp().sum(0), torch.ones(cells.log_widths.shape[1], dtype=torch.float64)
    )
    torch.testing.assert_close(cells.log_partition, cells.log_masses.exp().sum(0).log())


@pytest.mark.parametrize("shared", [True, False])
def test_cells_icdf_inverts_cdf(shared: bool) -> None:
    cells = _cells(shared=shared)
    u = torch.rand(500, 3, generator=_generator(1), dtype=torch.float64)
    torch.testing.assert_close(cells.unit_quantiles(cells.unit_cdf(u)), u, rtol=0, atol=1e-9)
    torch.testing.assert_close(cells.unit_cdf(cells.unit_quantiles(u)), u, rtol=0, atol=1e-12)
    assert (cells.unit_quantiles(u.sort(0).values).diff(dim=0) >= 0).all()


def test_cells_of_no_mass_hold_no_quantile_and_give_no_nan() -> None:
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    log_masses = torch.tensor([-math.inf, 0.0, -math.inf, 0.0], dtype=torch.float64)[:, None]
    cells = Cells(edges, edges[:-1] + 0.125, log_masses)
    u = torch.tensor([0.0, 0.2, 0.25, 0.375, 0.5, 0.6, 0.75, 1.0], dtype=torch.float64)[:, None]
    assert cells.unit_cdf(u).flatten().tolist() == [0, 0, 0, 0.25, 0.5, 0.5, 0.5, 1]
    quantiles = cells.unit_quantiles(torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]).flatten()
    assert quantiles.isfinite().all()
    assert not ((quantiles > 0.5) & (quantiles < 0.75)).any()
    assert not (quantiles < 0.25).any()


def test_equal_cells_are_the_uniform_distribution() -> None:
    edges = torch.linspace(0, 1, 17, dtype=torch.float64)
    cells = Cells(edges, (edges[1:] + edges[:-1]) / 2, torch.full((16, 2), -math.log(16), dtype=torch.float64))
    u = torch.rand(100, 2, generator=_generator(), dtype=torch.float64)
    torch.testing.assert_close(cells.unit_cdf(u), u)
    torch.testing.assert_close(cells.unit_quantiles(u), u)
    torch.testing.assert_close(cells.log_partition, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(cells.log_partition_stderr, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)

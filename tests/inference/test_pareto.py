"""Laws of the Pareto tail of importance weights: its shape, and the smoothing by it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from energyreg.inference.pareto import pareto_k
from energyreg.inference.points import WeightedPoints


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


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

"""R-hat and effective sample size against the published definitions, and on chains whose quality is known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from energyreg.inference.mcmc import MALA
from energyreg.inference.mcmc_diagnostics import effective_sample_size, rhat

DOUBLE = torch.float64


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=DOUBLE)


def _normal(y: Tensor) -> Tensor:
    return -y.square().sum(-1) / 2


def _autoregression(coefficient: float, n: int, *shape: int, seed: int = 0) -> Tensor:
    """A stationary chain of unit variance, shape (n, *shape)."""
    noise = _randn(n, *shape, seed=seed)
    y = [noise[0]]
    for step in noise[1:]:
        y.append(coefficient * y[-1] + math.sqrt(1 - coefficient**2) * step)
    return torch.stack(y)


def _split(draws: np.ndarray) -> np.ndarray:
    half = len(draws) // 2
    return np.concatenate([draws[:half], draws[len(draws) - half :]], 1)


def _scores(draws: np.ndarray) -> np.ndarray:
    rank = stats.rankdata(draws).reshape(draws.shape)
    return stats.norm.ppf((rank - 3 / 8) / (draws.size + 1 / 4))


def _rhat_by_the_book(draws: np.ndarray) -> float:
    """Of draws (N, C), as Vehtari et al. write it."""

    def plain(z: np.ndarray) -> float:
        n = len(z)
        between, within = n * z.mean(0).var(ddof=1), z.var(0, ddof=1).mean()
        return math.sqrt(((n - 1) / n * within + between / n) / within)

    folded = np.abs(draws - np.median(draws))
    return max(plain(_scores(_split(draws))), plain(_scores(_split(folded))))


def _ess_by_the_book(draws: np.ndarray) -> float:
    """Of draws (N, C), in loops, as Stan's reference manual and its code have it."""
    z = _scores(_split(draws))
    n, m = z.shape
    centred = z - z.mean(0)
    covariance = np.array([(centred[: n - t] * centred[t:]).sum(0).mean() / n for t in range(n)])
    within = covariance[0] * n / (n - 1)
    total = within * (n - 1) / n + z.mean(0).var(ddof=1)
    rho = np.zeros(n)
    even, odd = 1.0, 1 - (within - covariance[1]) / total
    rho[0], rho[1] = even, odd
    t = 0
    while t < n - 5 and even + odd > 0:
        t += 2
        even, odd = 1 - (within - covariance[t]) / total, 1 - (within - covariance[t + 1]) / total
        if even + odd >= 0:
            rho[t], rho[t + 1] = even, odd
    last = t
    if even > 0:
        rho[last] = even
    for t in range(0, last - 3, 2):
        if rho[t + 2] + rho[t + 3] > rho[t] + rho[t + 1]:
            rho[t + 2] = rho[t + 3] = (rho[t] + rho[t + 1]) / 2
    time = max(-1 + 2 * rho[:last].sum() + rho[last], 1 / math.log10(n * m))
    return float(n * m / time)


CASES = {
    "independent": _randn(100, 4, 2, 3),
    "autoregressive": _autoregression(0.9, 201, 3, 2, 2),
    "antithetic": _autoregression(-0.8, 60, 2, 2, 2),
    "one chain": _autoregression(0.5, 51, 1, 2, 2),
    "short": _randn(9, 2, 3, 2),
    "shifted": _randn(80, 4, 2, 2) + torch.arange(4.0)[:, None, None],
    "of different widths": _randn(80, 4, 2, 2) * (1 + torch.arange(4.0)[:, None, None]),
    "with ties": (2 * _autoregression(0.5, 100, 4, 2, 2)).round(),
    "with infinite variance": 1 / _randn(100, 4, 2, 2),
}


@pytest.mark.parametrize("samples", CASES.values(), ids=CASES)
def test_diagnostics_are_those_of_the_published_definitions(samples: Tensor) -> None:
    for ours, by_the_book in ((rhat, _rhat_by_the_book), (effective_sample_size, _ess_by_the_book)):
        expected = [[by_the_book(samples[:, :, b, d].numpy()) for d in range(samples.shape[3])] for b in range(2)]
        torch.testing.assert_close(ours(samples)[:2], torch.tensor(expected, dtype=DOUBLE), rtol=1e-9, atol=0)


@pytest.mark.parametrize("coefficient", [-0.4, 0.0, 0.6, 0.9])
def test_effective_sample_size_of_an_autoregression(coefficient: float) -> None:
    # N C (1 - r) / (1 + r). A correlation time summed over W lags has a relative variance of about 4 W / (N C): for
    # W = 60 (r = 0.9) and 8000 draws 17 %, in the mean of 40 columns 3 %; four of these, and a bias of 1 % or two.
    samples = _autoregression(coefficient, 2000, 4, 20, 2)
    share = effective_sample_size(samples).mean() / 8000
    assert share.item() == pytest.approx((1 - coefficient) / (1 + coefficient), rel=0.12)


def test_rhat_of_chains_that_agree_and_of_those_that_do_not() -> None:
    # Between halves of 500 independent draws R-hat - 1 is of order 1 / 1000.
    agree = _randn(1000, 4, 10, 1)
    assert (rhat(agree) - 1).abs().max() < 0.005
    apart = agree + torch.tensor([0.0, 0.0, 0.0, 3.0])[:, None, None]
    drifting = agree + torch.linspace(0, 3, 1000)[:, None, None, None]
    wider = agree * torch.tensor([1.0, 1.0, 1.0, 10.0])[:, None, None]  # alike in location: only the folded draws tell
    for samples in (apart, drifting, wider):
        assert rhat(samples).min() > 1.1
    assert effective_sample_size(apart).max() < 50


def test_chains_in_modes_that_they_cannot_leave_are_found_out() -> None:
    def f(y: Tensor) -> Tensor:
        return torch.logaddexp(-((y - 10).square()).sum(-1) * 2, -((y + 10).square()).sum(-1) * 2)

    start = torch.tensor([-10.0, 10.0, 10.0, -10.0], dtype=DOUBLE)[:, None, None]
    chains = MALA(num_samples=200, num_chains=4).run(f, start=start, generator=_generator())
    assert chains.rhat.item() > 1.1
    assert chains.effective_sample_size.item() < 10
    chains = MALA(num_samples=200, num_chains=4).run(_normal, start=start, generator=_generator())
    assert chains.rhat.item() < 1.05


def test_diagnostics_of_an_angle_do_not_see_where_the_circle_is_cut() -> None:
    narrow = 0.1 * _autoregression(0.5, 400, 4, 3, 1)
    cut = torch.remainder(narrow + 2 * math.pi, 2 * math.pi) - math.pi  # around ±π
    for statistic in (rhat, effective_sample_size):
        turned = statistic(cut, periodic=[True])
        torch.testing.assert_close(turned, statistic(narrow, periodic=[True]), rtol=1e-9, atol=0)
    # Chains at opposite ends of [-π, π) are in one place, and those at 0 and π are not.
    ends = narrow.clone()
    ends[:, ::2] += math.pi - 1e-9
    ends[:, 1::2] -= math.pi
    ends = torch.remainder(ends + math.pi, 2 * math.pi) - math.pi
    assert rhat(ends, periodic=[True]).max() < 1.05
    apart = narrow + torch.tensor([0.0, 3.0, 0.0, 3.0])[:, None, None]
    assert rhat(apart, periodic=[True]).min() > 1.1


def test_diagnostics_do_not_depend_on_monotone_maps_or_on_other_columns() -> None:
    samples = _autoregression(0.5, 100, 4, 3, 2)
    for statistic in (rhat, effective_sample_size):
        value = statistic(samples)
        torch.testing.assert_close(statistic(samples[:, :, 1:2]), value[1:2])
        assert statistic(samples.float()).dtype == torch.float32
        torch.testing.assert_close(statistic(samples.float()).double(), value, rtol=1e-4, atol=0)
    size = effective_sample_size(samples)
    torch.testing.assert_close(effective_sample_size(samples.exp()), size)


def test_diagnostics_of_chains_that_never_moved_or_diverged_are_nan() -> None:
    samples = torch.zeros(10, 2, 3, 1)
    samples[:, :, 1] = torch.randn(10, 2, 1, generator=_generator())
    samples[:, :, 2] = samples[:, :, 1]
    samples[9, 0, 2] = math.inf
    for statistic in (rhat, effective_sample_size):
        assert statistic(samples)[:, 0].isnan().tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"samples has shape \(3, 2, 1, 1\); expected \(N, C, B, D\) with at least"):
        rhat(torch.zeros(3, 2, 1, 1))
    with pytest.raises(ValueError, match=r"samples has shape \(30, 2\)"):
        effective_sample_size(torch.zeros(30, 2))

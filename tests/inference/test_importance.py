"""Laws of adaptive importance sampling: unbiased, within 2 % of known normalisers, row by row, on circles too."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, VonMises

from energyreg.densities.mixtures import GaussianMixture
from energyreg.densities.noise import GaussianNoise
from energyreg.inference.importance import AdaptiveImportanceSampling, ImportanceSampling
from energyreg.inference.points import WeightedPoints

Energy = Callable[[Tensor], Tensor]
SCALES = (0.0375, 0.075, 0.15)
FOR_SEVEN = AdaptiveImportanceSampling(256, 4, 256)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _proposal(dim: int, dtype: torch.dtype = torch.double) -> GaussianMixture:
    return GaussianNoise([(scale,) * dim for scale in SCALES])(torch.zeros(1, dim, dtype=dtype))


def _gaussian(dim: int, correlation: float, scale: float = 0.04, shift: float = 0.0) -> tuple[Energy, float]:
    """Neighbours are correlated, scales differ by a factor of two; and log Z."""
    scales = scale * (1 + torch.arange(dim, dtype=torch.double) % 3 / 2)
    places = torch.arange(dim, dtype=torch.double)
    covariance = correlation ** (places[:, None] - places).abs() * scales[:, None] * scales
    root = torch.linalg.cholesky(covariance)
    inverse = torch.linalg.inv(root)
    log_z = dim / 2 * math.log(2 * math.pi) + float(root.diagonal().log().sum())
    return lambda z: -0.5 * ((z - shift) @ inverse.T.to(z)).square().sum(-1), log_z


def _banana(dim: int, bend: float, scale: float = 0.04) -> tuple[Energy, float]:
    """A Gaussian whose second coordinate is bent by the first, which leaves its volume as it is."""
    straight, log_z = _gaussian(dim, 0.5, scale)

    def f(z: Tensor) -> Tensor:
        second = z[..., 1] - bend * (z[..., 0].square() / scale - scale)
        return straight(torch.cat([z[..., :1], second[..., None], z[..., 2:]], -1))

    return f, log_z


def _errors(rule: Any, f: Energy, log_z: float, dim: int, repeats: int) -> Tensor:
    found = [rule(f, _proposal(dim), generator=_generator(seed)).log_partition for seed in range(repeats)]
    return torch.cat(found) - log_z


@pytest.mark.parametrize("case", ["gaussian", "banana"])
@pytest.mark.parametrize(("dim", "rule"), [(4, AdaptiveImportanceSampling()), (7, FOR_SEVEN)])
def test_log_partition_is_right_to_two_percent(case: str, dim: int, rule: AdaptiveImportanceSampling) -> None:
    f, log_z = _gaussian(dim, 0.5) if case == "gaussian" else _banana(dim, 0.5)
    error = _errors(rule, f, log_z, dim, 60)
    assert error.mean().abs() < 0.02  # more than two standard errors of the mean of 60
    assert error.square().mean().sqrt() < 0.1


@pytest.mark.parametrize(("dim", "rule"), [(4, AdaptiveImportanceSampling()), (7, FOR_SEVEN)])
@pytest.mark.parametrize("case", ["ridge", "needle", "beside", "bent"])
def test_hard_densities_are_found(case: str, dim: int, rule: AdaptiveImportanceSampling) -> None:
    """Where as many samples of the proposal alone err by nats, or by several times as much."""
    f, log_z = {
        "ridge": lambda: _gaussian(dim, 0.9),
        "needle": lambda: _gaussian(dim, 0.9, scale=0.01),
        "beside": lambda: _gaussian(dim, 0.5, shift=0.08),
        "bent": lambda: _banana(dim, 1.0),
    }[case]()
    error = _errors(rule, f, log_z, dim, 30)
    assert error.square().mean().sqrt() < 0.4
    if case in ("needle", "beside"):
        plain = _errors(ImportanceSampling(rule.num_points(dim)), f, log_z, dim, 30)
        assert error.square().mean() < plain.square().mean() / 4


def test_the_estimate_of_z_is_unbiased_although_the_samplers_follow_the_samples() -> None:
    """A sampler that is fitted to the points it is weighed at is 17 % low here."""
    f, log_z = _gaussian(7, 0.5)
    ratio = _errors(AdaptiveImportanceSampling(rounds=1), f, log_z, 7, 200).exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / math.sqrt(200)
    assert ratio.std() / math.sqrt(200) < 0.015


def test_moments_and_effective_samples() -> None:
    f, _ = _gaussian(4, 0.5, shift=0.05)
    points = [AdaptiveImportanceSampling()(f, _proposal(4), generator=_generator(seed)) for seed in range(20)]
    mean = torch.stack([p.expectation()[0] for p in points])
    expected = 0.04 * torch.tensor([1.0, 1.5, 2.0, 1.0], dtype=torch.double)
    variance = torch.stack([p.expectation(lambda z: (z - 0.05).square())[0] for p in points]).mean(0)
    assert ((mean.mean(0) - 0.05).abs() < 4 * mean.std(0) / math.sqrt(20) + 1e-3).all()
    torch.testing.assert_close(variance.sqrt(), expected, rtol=0.05, atol=0)
    assert torch.cat([p.effective_sample_size for p in points]).median() > 100
    assert torch.cat([p.pareto_k for p in points]).median() < 0.7


def test_a_row_does_not_depend_on_the_others_nor_on_the_working_type() -> None:
    q = GaussianNoise([(scale,) * 4 for scale in SCALES])(torch.zeros(5, 4, dtype=torch.double))
    shifts = torch.linspace(-0.1, 0.1, 5, dtype=torch.double)[:, None]

    def energy(rows: slice, dtype: torch.dtype = torch.double) -> Energy:
        return lambda z: -0.5 * ((z - shifts[rows].to(dtype)) / 0.05).square().sum(-1)

    rule = AdaptiveImportanceSampling(64, 2, 64)
    together = rule(energy(slice(None)), q, generator=_generator())
    alone = rule(energy(slice(2, 4)), q[2:4], generator=_generator())
    torch.testing.assert_close(alone.y, together.y[:, 2:4], rtol=0, atol=1e-12)
    torch.testing.assert_close(alone.log_weights, together.log_weights[:, 2:4], rtol=0, atol=1e-9)
    assert together.y.shape == (192, 5, 4) and rule.num_points(4) == 192
    single = GaussianMixture(q.log_mixing.float(), q.means.float(), q.scales.float())
    points = rule(energy(slice(None), torch.float), single, generator=_generator())
    assert points.log_weights.dtype == torch.float32
    # Normal numbers of either type differ, as samples do: six of their standard errors.
    assert ((points.log_partition - together.log_partition).abs() < 6 * together.log_partition_stderr).all()


def test_same_generator_same_points_and_the_global_one_untouched() -> None:
    f, _ = _gaussian(4, 0.5)
    before = torch.get_rng_state()
    first, second, third = (AdaptiveImportanceSampling()(f, _proposal(4), generator=_generator(s)).y for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("centre", [0.3, math.pi - 0.05])
def test_angles_are_followed_across_their_cut(centre: float) -> None:
    """A von Mises angle beside a Gaussian coordinate, whose normaliser is that of a Bessel function."""
    concentration = 40.0

    def f(z: Tensor) -> Tensor:
        return concentration * (z[..., 1] - centre).cos() - 0.5 * (z[..., 0] / 0.1).square()

    angle = VonMises(torch.zeros((), dtype=torch.double), torch.tensor(concentration, dtype=torch.double))
    truth = concentration - float(angle.log_prob(angle.loc)) + math.log(0.1 * math.sqrt(2 * math.pi))
    start = torch.tensor([[0.1, centre - 0.3]], dtype=torch.double)
    q = GaussianNoise([(0.1, 0.2), (0.3, 0.6)], periodic=[False, True])(start)
    rule = AdaptiveImportanceSampling()
    found = [rule(f, q, generator=_generator(seed), periodic=[False, True]) for seed in range(40)]
    error = torch.cat([points.log_partition for points in found]) - truth
    assert error.mean().abs() < 0.01 and error.square().mean().sqrt() < 0.06
    points = found[0]
    assert ((points.y[..., 1] >= -math.pi) & (points.y[..., 1] < math.pi)).all()
    assert points.effective_sample_size > 150
    arc = points.expectation(lambda z: (z[..., 1] - centre).sin())
    assert arc.abs() < 0.06  # σ is 0.16, and there are some 200 effective samples


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_a_row_without_density_spoils_no_other(bad: float) -> None:
    q = GaussianNoise([(0.2,) * 3])(torch.zeros(2, 3))

    def f(z: Tensor) -> Tensor:
        value = -0.5 * (z / 0.1).square().sum(-1)
        return torch.stack([value[..., 0], torch.full_like(value[..., 1], bad)], -1)

    points = AdaptiveImportanceSampling()(f, q, generator=_generator())
    assert points.log_partition[0].isfinite() and not points.log_partition[1].isfinite()
    assert points.y.isfinite().all()


def test_a_window_cuts_the_density() -> None:
    """Half of a Gaussian is half of its Z: four of the largest standard errors of the mean."""
    f, log_z = _gaussian(4, 0.0)
    half = _errors(
        AdaptiveImportanceSampling(), lambda z: torch.where(z[..., 0] > 0, f(z), -torch.inf), log_z, 4, 60
    )  # fmt: skip
    assert (half.mean() + math.log(2)).abs() < 0.03


def test_gradients_flow_through_the_weights_and_not_through_the_points() -> None:
    height = torch.tensor(0.02, requires_grad=True)
    points = AdaptiveImportanceSampling()(
        lambda z: 2 * height - 0.5 * (z / 0.05).square().sum(-1), _proposal(3, torch.float), generator=_generator()
    )
    assert not points.y.requires_grad
    (slope,) = torch.autograd.grad(points.log_partition.sum(), height)
    torch.testing.assert_close(slope, torch.tensor(2.0))


def test_any_proposal_serves() -> None:
    q = Independent(Normal(torch.zeros(2, 3), 0.3), 1)
    points = AdaptiveImportanceSampling()(lambda z: -0.5 * (z / 0.1).square().sum(-1), q, generator=_generator())
    assert isinstance(points, WeightedPoints)
    truth = 1.5 * math.log(2 * math.pi * 0.01)
    assert ((points.log_partition - truth).abs() < 0.25).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0; expected a whole number of at least 2"),
        ({"num_samples": 65}, "num_samples is 65; expected an even number"),
        ({"samples_per_round": 2.5}, "samples_per_round is 2.5"),
        ({"rounds": 0}, "rounds is 0"),
        ({"degrees_of_freedom": 2}, "degrees_of_freedom is 2; expected a whole number of at least 3"),
        ({"least_effective": 0.5}, "least_effective is 0.5; expected a finite number of at least 1"),
        ({"least_effective": math.nan}, "least_effective is nan"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveImportanceSampling(**arguments)


def test_a_missing_proposal_and_wrong_angles_are_refused() -> None:
    f, _ = _gaussian(4, 0.5)
    with pytest.raises(ValueError, match="needs a proposal q"):
        AdaptiveImportanceSampling()(f)
    flags: Sequence[bool] = [True]
    with pytest.raises(ValueError, match="periodic has 1 entries, but y has 4 dimensions"):
        AdaptiveImportanceSampling()(f, _proposal(4), periodic=flags)

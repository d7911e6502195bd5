"""Laws of the noise around the target: its density is that of its samples, whatever spreads them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from energyreg.densities.noise import GaussianNoise
from energyreg.densities.spaces import Circle, Interval, Positive, Product, Real, TargetSpace

OPTIONS = {
    "independent": {"stratified": False},
    "stratified": {"stratified": True},
    "antithetic": {"stratified": False, "antithetic": True},
    "stratified and antithetic": {"antithetic": True},
    "quasi-random": {"quasi_random": True},
    "quasi-random and antithetic": {"quasi_random": True, "antithetic": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


DENSITIES: list[tuple[Any, tuple[bool, ...] | None, int]] = [
    ([0.7], None, 1),
    ([0.1, 1.5], None, 1),
    ([0.1, 1.5], None, 3),
    ([[0.1, 2.0], [1.5, 0.3], [0.5, 0.5]], None, 2),
    ([0.3, 4.0], (True,), 1),
    ([[0.1, 2.0], [1.5, 0.3]], (False, True), 2),
]


@pytest.mark.parametrize(("scales", "periodic", "dim"), DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_is_that_of_the_mixture(
    scales: Any, periodic: tuple[bool, ...] | None, dim: int, dtype: torch.dtype
) -> None:
    noise = GaussianNoise(scales, periodic)
    y, points = _randn(5, dim).to(dtype), 2 * _randn(7, 4, 5, dim, seed=1).to(dtype)
    value, mixture = noise.log_prob(points, y), noise(y)
    assert value.shape == (7, 4, 5) and value.dtype == dtype
    assert mixture.batch_shape == (5,) and mixture.event_shape == (dim,)
    # Distances of 60 scales give a log-density of -1,800, and float32 keeps six digits of it.
    torch.testing.assert_close(
        value, mixture.log_prob(points), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5
    )
    # By hand, without the library's mixture.
    if periodic is None:
        table = torch.tensor(scales, dtype=dtype).reshape(len(scales), -1).expand(-1, dim)
        normal = torch.distributions.Normal(y[:, None], table)
        by_hand = normal.log_prob(points[..., None, :]).sum(-1).logsumexp(-1) - math.log(len(scales))
        torch.testing.assert_close(value, by_hand, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)
    # At the target itself too, with the shape of one point a row.
    assert noise.log_prob(y, y).shape == (5,)


def test_density_on_a_circle_integrates_to_one_and_has_no_seam() -> None:
    noise, y = GaussianNoise([0.3, 2.0], (True,)), torch.tensor([[3.0], [0.0]], dtype=torch.float64)
    angle = -math.pi + (torch.arange(2000, dtype=torch.float64) + 0.5) * (2 * math.pi / 2000)
    density = noise.log_prob(angle[:, None, None], y).exp()
    # The rule of midpoints is exact to rounding for smooth periodic functions; the sum over turns is cut at 1e-6.
    torch.testing.assert_close(density.mean(0) * 2 * math.pi, torch.ones(2).double(), rtol=0, atol=1e-6)
    assert (density[0] - density[-1]).abs().max() < 2 * (density[1] - density[0]).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 2])
def test_density_keeps_its_digits_under_autocast(dtype: torch.dtype, dim: int) -> None:
    noise, y, points = GaussianNoise([1e-3, 0.1]), _randn(5, dim).float(), _randn(20, 5, dim, seed=1).float()
    expected = noise.log_prob(points, y)
    with torch.autocast("cpu", dtype=dtype):
        value = noise.log_prob(points, y)
    assert torch.equal(value, expected)


def _mixture_cdf(scales: Tensor) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: stats.norm.cdf(x[..., None] / scales.numpy()).mean(-1)


@each_option
@pytest.mark.parametrize("num_samples", [512, 33])
def test_samples_follow_the_density(options: dict[str, bool], num_samples: int) -> None:
    # The law of Kolmogorov and Smirnov holds for independent samples; all the options make the empirical cdf better,
    # so that what independent ones would reach once in 1,000 times is a bound for them too. (33 is odd: the mirror
    # images lack one.)
    noise = GaussianNoise([[0.1, 2.0], [1.5, 0.3], [0.5, 0.5]], **options)
    y = _randn(60, 2)
    offset = noise.sample(y, num_samples, generator=_generator(1)) - y
    scales = torch.tensor(noise.scales, dtype=torch.float64)
    for d in range(2):
        assert stats.kstest(offset[..., d].flatten().numpy(), _mixture_cdf(scales[:, d])).pvalue > 1e-3
    # A sloping direction sees that a component's scales come together, and that its dimensions are independent.
    for signs in ((1.0, 1.0), (1.0, -1.0), (0.3, 1.0)):
        direction = torch.tensor(signs, dtype=torch.float64)
        projected = (scales * direction).square().sum(-1).sqrt()
        assert stats.kstest((offset @ direction).flatten().numpy(), _mixture_cdf(projected)).pvalue > 1e-3


@each_option
def test_each_single_sample_follows_the_density(options: dict[str, bool]) -> None:
    # Whatever its place: none is bound to a component, or a side. Rows are independent repeats here.
    noise, y = GaussianNoise([0.1, 1.5], **options), torch.zeros(2000, 1, dtype=torch.float64)
    for sample in noise.sample(y, 5, generator=_generator()):
        assert stats.kstest(sample.flatten().numpy(), _mixture_cdf(torch.tensor([0.1, 1.5]))).pvalue > 1e-3


@pytest.mark.parametrize("num_samples", [4, 9, 64])
def test_strata_share_the_samples_evenly(num_samples: int) -> None:
    # Scales so far apart that a sample tells its component: no component is off its share by two or more.
    noise, y = GaussianNoise([1e-9, 1.0, 1e9]), torch.zeros(200, 1, dtype=torch.float64)
    size = noise.sample(y, num_samples, generator=_generator()).abs()[..., 0]
    for component in (size < 1e-5, (size > 1e-5) & (size < 1e5), size > 1e5):
        assert (component.sum(0) - num_samples / 3).abs().max() < 2


@each_option
def test_samples_on_a_circle_follow_the_density(options: dict[str, bool]) -> None:
    noise = GaussianNoise([0.3, 2.0], (True,), **options)
    y = torch.full((60, 1), 3.0, dtype=torch.float64)
    samples = noise.sample(y, 512, generator=_generator())
    assert ((samples >= -math.pi) & (samples < math.pi)).all()
    mixture = noise(y[:1])
    cdf = lambda x: mixture.cdf(torch.as_tensor(x).reshape(-1, 1, 1))[:, 0].numpy()  # noqa: E731
    assert stats.kstest(samples.flatten().numpy(), cdf).pvalue > 1e-3


@each_option
def test_rows_are_drawn_for_themselves(options: dict[str, bool]) -> None:
    # 400 repeats of the means over the samples in two rows: uncorrelated, with a standard error of 1 / 20 each; four of
    # these for three functions. One set of offsets for all rows would give a correlation of one.
    noise, y = GaussianNoise([0.3, 1.5], **options), torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    offsets = torch.stack([noise.sample(y, 8, generator=_generator(seed)) - y for seed in range(400)])[..., 0]
    assert not torch.equal(offsets[..., 0], offsets[..., 1])
    for g in (lambda o: (o + 0.5).tanh(), torch.cos, lambda o: (3 * o + 1).sin()):
        correlation = torch.corrcoef(g(offsets).mean(1).T)[0, 1]
        assert abs(correlation) < 4 / math.sqrt(400)


SCALES = [0.2, 1.6]
_log_mean = sum(math.log(s) for s in SCALES) / 2 - (np.euler_gamma + math.log(2)) / 2
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "odd": (torch.tanh, 0.0),
    "even": (lambda o: (2 * o).cos(), sum(math.exp(-2 * s**2) for s in SCALES) / 2),
    "of the scale": (lambda o: o.abs().log(), _log_mean),
    "monotone": (lambda o: (0.5 * o).exp(), sum(math.exp(s**2 / 8) for s in SCALES) / 2),
}
# The largest ratio to the variance of independent samples, with a margin over what theory promises.
# Strata over the components leave the variance within: for log |o| this is π² / 8 of π² / 8 + (log 8 / 2)², 0.53.
# Mirror images take away odd functions whole. Of exp(o / 2), whose variance is 0.89, they leave cosh(o / 2) at half as
# many points, 2 × 0.24. Sobol points are better by orders where the function is bounded, less for exp.
SMALLER = [
    ("stratified", "of the scale", 0.65),
    ("antithetic", "odd", 1e-20),
    ("antithetic", "monotone", 0.6),
    ("stratified and antithetic", "odd", 1e-20),
    ("stratified and antithetic", "monotone", 0.6),
    ("quasi-random", "odd", 0.2),
    ("quasi-random", "even", 0.2),
    ("quasi-random", "of the scale", 0.2),
    ("quasi-random", "monotone", 0.5),
    ("quasi-random and antithetic", "odd", 1e-20),
]


def _means(option: str, function: str, num_samples: int = 64, rows: int = 3000) -> Tensor:
    """Means over the samples in rows that are all alike, and so independent repeats."""
    noise, y = GaussianNoise(SCALES, **OPTIONS[option]), torch.zeros(rows, 1, dtype=torch.float64)
    return FUNCTIONS[function][0](noise.sample(y, num_samples, generator=_generator())[..., 0]).mean(0)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("num_samples", [1, 5, 64])
def test_means_over_samples_have_the_expectation_under_the_density(
    option: str, function: str, num_samples: int
) -> None:
    means = _means(option, function, num_samples)
    # Four standard errors in 72 tests; and rounding, where mirror images leave no variance.
    tolerance = 4 * means.std() / math.sqrt(len(means)) + 1e-12
    assert abs(means.mean() - FUNCTIONS[function][1]) < tolerance


@pytest.mark.parametrize(("option", "function", "most"), SMALLER)
def test_means_over_spread_samples_have_a_smaller_variance(option: str, function: str, most: float) -> None:
    # Variances from 3,000 repeats are known to about 3 %, those of these functions to less than 10 %.
    assert _means(option, function).var() < most * _means("independent", function).var()


@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_generator_same_samples(options: dict[str, bool], dtype: torch.dtype) -> None:
    noise, y = GaussianNoise([[0.1, 1.0], [1.0, 2.0]], **options), _randn(5, 2).to(dtype).requires_grad_()
    state = torch.get_rng_state()
    first, again, other = (noise.sample(y, 7, generator=_generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (7, 5, 2) and first.dtype == dtype and not first.requires_grad
    # Without one the global source is used.
    torch.manual_seed(3)
    drawn = noise.sample(y, 7)
    torch.manual_seed(3)
    assert torch.equal(drawn, noise.sample(y, 7))
    assert not torch.equal(drawn, noise.sample(y, 7))


def test_noise_is_a_value() -> None:
    noise = GaussianNoise([0.1, 1.0])
    assert noise == GaussianNoise(torch.tensor([0.1, 1.0], dtype=torch.float64)) == GaussianNoise(np.array([0.1, 1.0]))
    assert hash(noise) == hash(GaussianNoise([[0.1], [1.0]]))
    assert noise != GaussianNoise([0.1, 1.0], antithetic=True)
    assert noise.num_components == 2


# Scales from targets and units --------------------------------------------------------------------------------------


def test_scales_for_targets_are_a_geometric_ladder_in_each_dimension() -> None:
    y = _randn(500, 2) * torch.tensor([1.0, 30.0]) + 7
    noise = GaussianNoise.for_targets(y, 5, smallest=0.05, largest=2.0)
    factors = torch.tensor(noise.scales) / y.std(0).float()
    torch.testing.assert_close(factors[0], torch.full((2,), 0.05))
    torch.testing.assert_close(factors[-1], torch.full((2,), 2.0))
    torch.testing.assert_close(factors[1:] / factors[:-1], torch.full((4, 2), 40 ** (1 / 4)))
    # One scale is the middle of the ladder, and by default there are three.
    (single,) = GaussianNoise.for_targets(y, 1, smallest=0.05, largest=2.0).scales
    assert single[0] / float(y[:, 0].std()) == pytest.approx(math.sqrt(0.05 * 2.0))
    assert GaussianNoise.for_targets(y).num_components == 3
    assert GaussianNoise.for_targets(y, np.int64(2)).num_components == 2


def test_scales_for_angles_know_the_seam() -> None:
    # A wrapped Gaussian of 0.3 around the seam, whose linear standard deviation is 3.
    angle = torch.remainder(math.pi + 0.3 * _randn(4000, 1) + math.pi, 2 * math.pi) - math.pi
    y = torch.cat([_randn(4000, 1, seed=1), angle], 1)
    noise = GaussianNoise.for_targets(y, 2, periodic=(False, True))
    # A standard deviation from 4,000 samples is known to 1 / √8,000 = 1.1 %; four of these.
    assert noise.scales[0][1] == pytest.approx(0.1 * 0.3, rel=0.045)
    assert noise.scales[0][0] == pytest.approx(0.1 * float(y[:, 0].std()))
    assert noise.periodic == (False, True)
    # Targets all around have the uniform's spread, and no more.
    around = torch.linspace(-math.pi, math.pi, 1001, dtype=torch.float64)[:-1, None]
    assert GaussianNoise.relative([1.0], around, (True,)).scales[0][0] == pytest.approx(math.pi / math.sqrt(3))


def test_relative_scales_are_multiples_of_the_spread() -> None:
    y = _randn(500, 2) * torch.tensor([1.0, 30.0])
    spread = y.std(0).tolist()
    assert GaussianNoise.relative([0.1, 1.0], y) == GaussianNoise([[0.1 * s for s in spread], spread])
    own = GaussianNoise.relative([[0.1, 0.2], [1.0, 2.0]], y)
    assert own.scales[0] == pytest.approx((0.1 * spread[0], 0.2 * spread[1]))


@pytest.mark.parametrize(
    ("space", "y", "scales", "periodic"),
    [
        (Real(1), 50 + 4 * _randn(300, 1), [2.0], None),
        (Real(1), 1e9 + _randn(300, 1), [2.0], None),
        (Real(2), _randn(300, 2) * torch.tensor([1.0, 30.0]), [[2.0, 9.0]], None),
        (Circle(360.0), 360 * torch.rand(300, 1, generator=_generator(), dtype=torch.float64), [20.0], (True,)),
        (Product(Real(), Circle(360.0)), 20 * _randn(300, 2), [[2.0, 15.0]], (False, True)),
    ],
)
def test_scales_in_user_units(
    space: TargetSpace, y: Tensor, scales: list[Any], periodic: tuple[bool, ...] | None
) -> None:
    space.fit(y)
    noise = GaussianNoise.in_user_units(scales, space)
    assert noise.periodic == periodic
    # A step by the scale in model space is a step by the scale in user units.
    centre = space.to_user(torch.zeros(1, space.dim, dtype=torch.float64))
    there = space.to_user(torch.tensor(noise.scales, dtype=torch.float64))
    step = there - centre
    if periodic:
        step = torch.where(torch.tensor(periodic), torch.remainder(step, 360), step)
    # 1e9 ± 1 keeps seven digits after the point in double precision.
    torch.testing.assert_close(step, torch.tensor(scales).double().reshape(1, -1), rtol=1e-6, atol=0)


def test_one_scale_in_user_units_serves_every_dimension() -> None:
    space = Real(2)
    space.fit(_randn(300, 2) * torch.tensor([1.0, 30.0]))
    assert GaussianNoise.in_user_units([2.0], space) == GaussianNoise.in_user_units([[2.0, 2.0]], space)


@pytest.mark.parametrize("space", [Positive(), Interval(0.0, 10.0), Product(Real(), Positive())])
def test_a_space_that_bends_has_no_scale_in_user_units(space: TargetSpace) -> None:
    with pytest.raises(ValueError, match="not fitted"):
        GaussianNoise.in_user_units([0.1], space)
    space.fit(1 + 5 * torch.rand(100, space.dim, generator=_generator()))
    with pytest.raises(ValueError, match="bends at least one dimension"):
        GaussianNoise.in_user_units([0.1], space)


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scales",
    [[], [0.0], [-1.0, 1.0], [math.nan], [math.inf], 0.3, None, "wide", [[0.1, 0.2], [0.3]], [[]], [[[0.1]]], [0.1, 0]],
)
def test_wrong_scales_are_refused(scales: Any) -> None:
    with pytest.raises(ValueError, match="scales"):
        GaussianNoise(scales)
    with pytest.raises(ValueError, match="scales"):
        GaussianNoise.relative(scales, _randn(9, 1))


def test_scales_of_another_length_than_the_targets_are_refused() -> None:
    noise, y = GaussianNoise([[0.1, 0.2, 0.3]]), torch.zeros(4, 2)
    for call in (lambda: noise.sample(y, 3), lambda: noise.log_prob(y, y), lambda: noise(y)):
        with pytest.raises(ValueError, match="scales has 3 numbers per component, but y has 2 dimensions"):
            call()
    noise = GaussianNoise([0.1], (True, False, False))
    for call in (lambda: noise.sample(y, 3), lambda: noise.log_prob(y, y), lambda: noise(y)):
        with pytest.raises(ValueError, match="periodic has 3 entries, but y has 2 dimensions"):
            call()
    with pytest.raises(ValueError, match="scales has 3 numbers per component, but periodic has 2"):
        GaussianNoise([[0.1, 0.2, 0.3]], (True, False))
    with pytest.raises(ValueError, match="3 numbers per component; y has 2 dimensions"):
        GaussianNoise.relative([[0.1, 0.2, 0.3]], _randn(9, 2))
    space = Real(2)
    space.fit(_randn(9, 2))
    with pytest.raises(ValueError, match="3 numbers per component; the space has 2 dimensions"):
        GaussianNoise.in_user_units([[0.1, 0.2, 0.3]], space)


@pytest.mark.parametrize("number", [0, -1, 1.5, 2.0, True, "3", None, math.nan])
def test_wrong_counts_are_refused(number: Any) -> None:
    with pytest.raises(ValueError, match="num_samples is"):
        GaussianNoise([0.1]).sample(torch.zeros(4, 1), number)
    with pytest.raises(ValueError, match="num_components is"):
        GaussianNoise.for_targets(_randn(9, 1), number)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(9, 1), "constant in dimension"),
        (torch.cat([_randn(9, 1), torch.ones(9, 1)], 1), r"constant in dimension\(s\) \[1\]"),
        (torch.tensor([[1.0], [math.nan]]), "not finite"),
        (torch.zeros(1, 1), "at least two rows"),
        (torch.zeros(9), "expected"),
    ],
)
def test_targets_without_a_spread_are_refused(y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianNoise.for_targets(y)
    with pytest.raises(ValueError, match=message):
        GaussianNoise.relative([1.0], y)


@pytest.mark.parametrize(("smallest", "largest"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (0.1, math.inf), (math.nan, 1)])
def test_a_ladder_that_does_not_rise_is_refused(smallest: float, largest: float) -> None:
    with pytest.raises(ValueError, match="smallest is"):
        GaussianNoise.for_targets(_randn(9, 1), smallest=smallest, largest=largest)
    with pytest.raises(ValueError, match="periodic has 2 entries"):
        GaussianNoise.for_targets(_randn(9, 1), periodic=(True, False))

"""Laws of the proposals: densities against torch's own, samples against the cdf, moments, errors."""

import math

import pytest
import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, LowRankMultivariateNormal, MixtureSameFamily, Normal

from energyreg.densities.mixtures import GaussianMixture
from energyreg.networks.proposals import DistributionProposal, MixtureDensityNetwork

ROWS, COMPONENTS = 3, 4


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def _mixture(dim: int = 1, rank: int = 0, periodic: tuple[bool, ...] | None = None) -> GaussianMixture:
    scales = 0.2 + 0.8 * _randn(ROWS, COMPONENTS, dim, seed=1).square().clamp_max(1)
    factor = _randn(ROWS, COMPONENTS, dim, rank, seed=2) if rank else None
    return GaussianMixture(
        _randn(ROWS, COMPONENTS, seed=3), 2 * _randn(ROWS, COMPONENTS, dim, seed=4), scales, factor, periodic
    )


def _reference(q: GaussianMixture) -> MixtureSameFamily:
    if q.factor is None:
        components = Independent(Normal(q.means, q.scales), 1)
    else:
        components = LowRankMultivariateNormal(q.means, q.factor, q.scales.square())
    return MixtureSameFamily(Categorical(logits=q.log_mixing), components)


def _ks(samples: Tensor, cdf: Tensor) -> Tensor:
    """Kolmogorov-Smirnov statistic times √n of each row, from the cdf at sorted samples, both (n, B)."""
    n = len(samples)
    steps = torch.arange(n + 1, dtype=torch.float64)[:, None] / n
    return math.sqrt(n) * torch.maximum((steps[1:] - cdf).amax(0), (cdf - steps[:-1]).amax(0))


LEVEL = 2.23
"""√n times the Kolmogorov-Smirnov statistic exceeds this with probability 2 exp(-2 · 2.23²), 1e-4."""

LINES = [(1, 0), (2, 0), (3, 0), (2, 1), (3, 2)]


@pytest.mark.parametrize(("dim", "rank"), LINES)
def test_log_prob_is_that_of_torch(dim: int, rank: int) -> None:
    q = _mixture(dim, rank)
    for y in (3 * _randn(7, ROWS, dim, seed=5), 3 * _randn(2, 5, ROWS, dim, seed=6), _randn(ROWS, dim, seed=7)):
        torch.testing.assert_close(q.log_prob(y), _reference(q).log_prob(y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dim", "rank"), LINES)
def test_moments_are_those_of_torch(dim: int, rank: int) -> None:
    q = _mixture(dim, rank)
    torch.testing.assert_close(q.mean, _reference(q).mean)
    torch.testing.assert_close(q.variance, _reference(q).variance)
    torch.testing.assert_close(q.stddev, _reference(q).variance.sqrt())


def test_cdf_is_that_of_torch() -> None:
    q, y = _mixture(), 3 * _randn(20, ROWS, 1)
    expected = (q.log_mixing.exp() * Normal(q.means[..., 0], q.scales[..., 0]).cdf(y)).sum(-1)
    torch.testing.assert_close(q.cdf(y), expected)


@pytest.mark.parametrize(
    ("dim", "rank", "periodic"),
    [(1, 0, None), (2, 0, None), (2, 1, None), (1, 0, (True,)), (2, 0, (True, False)), (2, 0, (True, True))],
)
def test_points_shared_by_all_rows_equal_expanded_ones(dim: int, rank: int, periodic: tuple[bool, ...] | None) -> None:
    q, y = _mixture(dim, rank, periodic), _randn(11, 1, dim)
    torch.testing.assert_close(q.log_prob(y), q.log_prob(y.expand(-1, ROWS, -1)), rtol=1e-12, atol=1e-12)
    if dim == 1:
        torch.testing.assert_close(q.cdf(y), q.cdf(y.expand(-1, ROWS, -1)), rtol=1e-12, atol=1e-12)


def _around_the_circle(points: int = 4096) -> Tensor:
    # Equally spaced points integrate a smooth periodic function to rounding.
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 * math.pi - math.pi


@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("mean", [0.0, 3.0, -math.pi, 7.0, 40.0])
def test_wrapped_density_integrates_to_one(scale: float, mean: float) -> None:
    means = torch.tensor([[[mean], [0.3]]], dtype=torch.float64)
    q = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), means, torch.full_like(means, scale), None, (True,))
    angle = _around_the_circle()
    density = q.log_prob(angle[:, None, None]).exp()
    # Beyond three and a half turns of scale 3 remain 2e-13; a mean at the cut leaves three turns on one side, 2e-10.
    assert density.mean().item() * 2 * math.pi == pytest.approx(1, abs=1e-8)
    ends = q.log_prob(torch.tensor([[[-math.pi]], [[math.pi]]], dtype=torch.float64))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", [6.0, 30.0, 1000.0])
def test_a_very_wide_wrapped_density_is_uniform(scale: float) -> None:
    means = torch.tensor([[[2.0]]], dtype=torch.float64)
    q = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), means, torch.full_like(means, scale), None, (True,))
    angle = _around_the_circle()[::64, None, None]
    # The first harmonic of a wrapped normal has the amplitude 2 exp(-scale² / 2): 3e-8 and less.
    torch.testing.assert_close(
        q.log_prob(angle).exp(), torch.full_like(angle[..., 0], 1 / (2 * math.pi)), rtol=1e-3, atol=0
    )


def test_wrapped_cdf_is_the_integral_of_the_density() -> None:
    q, n = _mixture(periodic=(True,)), 4096
    edges = torch.linspace(-math.pi, math.pi, n + 1, dtype=torch.float64)
    masses = q.log_prob(_around_the_circle(n)[:, None, None]).exp() * 2 * math.pi / n
    cdf = q.cdf(edges[:, None, None])
    # The midpoint rule's error is h² f' / 24, with h = 1.5e-3 and |f'| < 10.
    torch.testing.assert_close(cdf[1:], masses.cumsum(0), rtol=0, atol=2e-6)
    torch.testing.assert_close(cdf[0], torch.zeros_like(cdf[0]), rtol=0, atol=1e-12)
    # Scales up to 1 and means up to π + 4 outside leave less than three turns, 1e-9.
    torch.testing.assert_close(cdf[-1], torch.ones_like(cdf[0]), rtol=0, atol=1e-8)


def test_mixed_line_and_circle_integrates_to_one() -> None:
    q, angle = _mixture(2, periodic=(True, False)), _around_the_circle(64)
    line = torch.linspace(-14, 14, 701, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(angle, line, indexing="ij"), -1).reshape(-1, 1, 2)
    density = q.log_prob(grid).exp().reshape(len(angle), len(line), ROWS)
    total = torch.trapezoid(density, line, dim=1).mean(0) * 2 * math.pi
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-8)


@pytest.mark.parametrize("periodic", [(False,), (True,)])
@pytest.mark.parametrize("how", ["independent", "stratified", "uniforms"])
def test_samples_follow_the_cdf(periodic: tuple[bool, ...], how: str) -> None:
    q, n = _mixture(periodic=periodic), 20_000
    if how == "uniforms":
        samples = q.from_uniforms(torch.rand(n, q.num_uniforms, generator=_generator(), dtype=torch.float64))
    else:
        samples = q.sample((n,), generator=_generator(), stratified=how == "stratified")
    assert samples.shape == (n, ROWS, 1)
    if periodic[0]:
        assert samples.abs().max() <= math.pi
    ordered = samples.sort(0).values
    statistic = _ks(ordered[..., 0], q.cdf(ordered))
    # Three rows, six cases: a false alarm in 2 of 1000 choices of the seed. Stratified samples are closer than
    # independent ones.
    assert (statistic < LEVEL).all()


@pytest.mark.parametrize(("dim", "rank"), LINES)
@pytest.mark.parametrize("how", ["independent", "stratified", "quasi_random"])
def test_moments_against_samples(dim: int, rank: int, how: str) -> None:
    q, n = _mixture(dim, rank), 2**15
    if how == "quasi_random":
        uniforms = torch.quasirandom.SobolEngine(q.num_uniforms, scramble=True, seed=0).draw(n, dtype=torch.double)
        samples = q.from_uniforms(uniforms.clamp(1e-9, 1 - 1e-9))
    else:
        samples = q.sample((n,), generator=_generator(), stratified=how == "stratified")
    # Standard errors of the mean and of the variance of n independent samples; five of them for nine numbers at most.
    centred = samples - q.mean
    assert ((samples.mean(0) - q.mean).abs() < 5 * samples.std(0) / math.sqrt(n)).all()
    assert ((centred.square().mean(0) - q.variance).abs() < 5 * centred.square().std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize(("dim", "rank"), [(2, 0), (2, 1), (3, 2)])
def test_covariance_of_samples(dim: int, rank: int) -> None:
    q, n = _mixture(dim, rank), 40_000
    samples = q.sample((n,), generator=_generator()) - q.mean
    products = samples[..., :, None] * samples[..., None, :]
    weights, centred = q.log_mixing.exp(), q.means - q.mean[:, None]
    covariance = centred[..., :, None] * centred[..., None, :] + torch.diag_embed(q.scales.square())
    if q.factor is not None:
        covariance = covariance + q.factor @ q.factor.mT
    expected = (weights[..., None, None] * covariance).sum(1)
    assert ((products.mean(0) - expected).abs() < 5 * products.std(0) / math.sqrt(n)).all()


def test_stratification_lowers_the_error_of_the_mean() -> None:
    q = GaussianMixture(_randn(1, 4), 10 * _randn(1, 4, 1, seed=1), torch.full((1, 4, 1), 0.1, dtype=torch.float64))
    errors = {
        stratified: torch.stack(
            [q.sample((64,), generator=_generator(seed), stratified=stratified).mean(0) - q.mean for seed in range(200)]
        )
        for stratified in (False, True)
    }
    # Nearly all of the variance is between the components, which the strata share out to within one sample.
    assert errors[True].square().mean() < errors[False].square().mean() / 5
    assert errors[True].mean().abs() < 4 * errors[True].std() / math.sqrt(200)


def test_circular_mean_against_samples() -> None:
    q, n = _mixture(periodic=(True,)), 50_000
    samples = q.sample((n,), generator=_generator())
    direction = torch.atan2(samples.sin().mean(0), samples.cos().mean(0))
    length = (samples.sin().mean(0).square() + samples.cos().mean(0).square()).sqrt()
    # The standard error of the direction is at most 1 / (length √n).
    assert ((direction - q.mean + math.pi).remainder(2 * math.pi) - math.pi).abs().lt(5 / (length * math.sqrt(n))).all()


def test_samples_depend_on_the_generator_alone_and_carry_no_gradient() -> None:
    q = MixtureDensityNetwork(context_dim=3)(torch.randn(5, 3, generator=_generator()))
    first = q.sample((4,), generator=_generator(1))
    torch.manual_seed(99)
    torch.testing.assert_close(first, q.sample((4,), generator=_generator(1)), rtol=0, atol=0)
    assert not torch.equal(first, q.sample((4,), generator=_generator(2)))
    assert not first.requires_grad
    assert q.sample().shape == (5, 1)
    assert q.sample((2, 3)).shape == (2, 3, 5, 1)


@pytest.mark.parametrize(("dim", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_log_prob_does_not_underflow_a_thousand_scales_away(dim: int, rank: int) -> None:
    exact, y = _mixture(dim, rank), torch.full((1, dim), 1e3, dtype=torch.float64)
    single = GaussianMixture(
        exact.log_mixing.float(),
        exact.means.float(),
        exact.scales.float(),
        None if exact.factor is None else exact.factor.float(),
    )
    log_prob = single.log_prob(y.float())
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob.double(), exact.log_prob(y), rtol=1e-4, atol=0)
    means = single.means.clone().requires_grad_()
    GaussianMixture(single.log_mixing, means, single.scales, single.factor).log_prob(y.float()).sum().backward()
    assert means.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.1, 0.01, 1e-3])
def test_low_rank_log_prob_is_accurate_in_single_precision(scale: float) -> None:
    # Thin ellipses, down to the default floor of the scales, at points that are likely under them.
    means, factor = _randn(200, 1, 2).float().double(), _randn(200, 1, 2, 1, seed=1).float().double()
    logits, scales = torch.zeros(200, 1, dtype=torch.float64), torch.full_like(means, scale).float().double()
    exact = GaussianMixture(logits, means, scales, factor)
    y = exact.sample(generator=_generator()).float()
    single = GaussianMixture(logits.float(), means.float(), scales.float(), factor.float())
    # Differences of numbers of size 3 are known to 3e-7, in scales to 3e-4 at the floor; times a distance of 3 scales
    # or so, and the factor's own rounding on the long axis.
    torch.testing.assert_close(single.log_prob(y).double(), exact.log_prob(y.double()), rtol=0, atol=2e-5 / scale)


def test_wrapped_log_prob_of_a_narrow_component_does_not_underflow() -> None:
    q = GaussianMixture(torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.full((1, 1, 1), 1e-3), None, (True,))
    # Half a turn away, 3142 scales; two turns meet there.
    expected = -0.5 * (math.pi / 1e-3) ** 2 + math.log(2) - math.log(1e-3) - 0.5 * math.log(2 * math.pi)
    assert q.log_prob(torch.tensor([[math.pi]])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("dim", "rank", "periodic"), [(1, 0, None), (2, 0, None), (3, 2, None), (1, 0, (True,)), (2, 0, (True, False))]
)
def test_network_has_gradients_to_every_parameter(dim: int, rank: int, periodic: tuple[bool, ...] | None) -> None:
    torch.manual_seed(0)
    network = MixtureDensityNetwork(context_dim=5, dim=dim, num_components=3, rank=rank, periodic=periodic, width=16)
    q = network(torch.randn(ROWS, 5))
    assert (q.batch_shape, q.event_shape) == ((ROWS,), (dim,))
    q.log_prob(torch.randn(ROWS, dim)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_scales_never_fall_below_the_floor() -> None:
    network = MixtureDensityNetwork(context_dim=2, num_components=3, width=8, min_scale=0.05)
    with torch.no_grad():
        network.output.bias.fill_(-1e4)
    q = network(torch.randn(ROWS, 2, generator=_generator()))
    assert (q.scales >= 0.05).all()
    assert q.scales.min().item() == pytest.approx(0.05)
    # So the density is bounded.
    assert q.log_prob(q.means[:, 0]).max() <= -math.log(0.05) - 0.5 * math.log(2 * math.pi) + 1e-5


def test_expand_repeats_the_mixture() -> None:
    q = _mixture(2, 1)
    larger = q.expand((6, ROWS))
    assert larger.batch_shape == (6, ROWS)
    y = _randn(6, ROWS, 2)
    torch.testing.assert_close(larger.log_prob(y), q.log_prob(y))


def test_what_has_no_closed_form_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="one dimension; this mixture has 2"):
        _mixture(2).cdf(torch.zeros(1, 2))
    with pytest.raises(NotImplementedError, match="variance"):
        _ = _mixture(periodic=(True,)).variance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_dim": 0}, "context_dim is 0"),
        ({"context_dim": 2, "dim": 0}, "dim is 0"),
        ({"context_dim": 2, "num_components": 0}, "num_components is 0"),
        ({"context_dim": 2, "width": 0}, "width is 0"),
        ({"context_dim": 2, "rank": -1}, "rank"),
        ({"context_dim": 2, "min_scale": 0.0}, "min_scale is 0.0"),
        ({"context_dim": 2, "min_scale": math.nan}, "min_scale is nan"),
        ({"context_dim": 2, "dim": 2, "periodic": [True]}, "periodic has 1 entries, but dim is 2"),
        ({"context_dim": 2, "rank": 1, "periodic": [True]}, "rank is 1, but a dimension is periodic"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureDensityNetwork(**arguments)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 3, 1\) and \(2, 1, 1\)"):
        GaussianMixture(torch.zeros(2, 3), torch.zeros(2, 3, 1), torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match="factor is given, but a dimension is periodic"):
        GaussianMixture(torch.zeros(2, 3), torch.zeros(2, 3, 1), torch.ones(2, 3, 1), torch.ones(2, 3, 1, 1), (True,))


class _Gaussian(nn.Module):
    """A user's own conditional distribution, Independent over D."""

    def __init__(self, context_dim: int, dim: int, independent: bool = True) -> None:
        super().__init__()
        self.linear, self.independent = nn.Linear(context_dim, dim), independent

    def forward(self, context: Tensor) -> torch.distributions.Distribution:
        q = Normal(self.linear(context), 0.7)
        return Independent(q, 1) if self.independent else q


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_any_distribution_module_is_a_proposal(dim: int, kind: str) -> None:
    torch.manual_seed(0)
    module = _Gaussian(3, dim) if kind == "gaussian" else zuko.flows.NSF(dim, 3, transforms=1, hidden_features=[8])
    proposal, context = DistributionProposal(module, dim=dim), torch.randn(ROWS, 3)
    q = proposal(context)
    assert (q.batch_shape, q.event_shape) == ((ROWS,), (dim,))
    samples = q.sample((6,))
    assert samples.shape == (6, ROWS, dim)
    torch.testing.assert_close(q.log_prob(samples), module(context).log_prob(samples))
    shared = samples[:, :1]
    torch.testing.assert_close(q.log_prob(shared), q.log_prob(shared.expand(-1, ROWS, -1)))
    q.log_prob(samples[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in proposal.parameters())


def test_a_scalar_event_is_taken_in_one_dimension() -> None:
    proposal = DistributionProposal(_Gaussian(3, 1, independent=False))
    q = proposal(torch.randn(ROWS, 3))
    assert (q.batch_shape, q.event_shape) == ((ROWS,), (1,))


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_any_distribution_is_wrapped_on_the_circle(kind: str) -> None:
    torch.manual_seed(0)
    module = _Gaussian(3, 1) if kind == "gaussian" else zuko.flows.NSF(1, 3, transforms=1, hidden_features=[8])
    q = DistributionProposal(module, periodic=[True])(torch.randn(ROWS, 3))
    with torch.no_grad():
        angle = _around_the_circle()[:, None, None].float()
        total = q.log_prob(angle.expand(-1, ROWS, -1)).exp().mean(0) * 2 * math.pi
        # Single precision, and splines with kinks in their third derivative.
        torch.testing.assert_close(total, torch.ones(ROWS), rtol=0, atol=1e-4)
        samples = q.sample((5000,))
        assert samples.abs().max() <= math.pi + 1e-6
        # Samples against the density, in twelve sectors: five standard errors of a share of 5000, at most.
        edges = torch.linspace(-math.pi, math.pi, 13)
        density = q.log_prob(angle.expand(-1, ROWS, -1)).exp() * 2 * math.pi / len(angle)
        sector = torch.bucketize(angle[:, 0, 0].contiguous(), edges[1:-1])
        for k in range(12):
            share = ((samples[..., 0] >= edges[k]) & (samples[..., 0] < edges[k + 1])).float().mean(0)
            assert (share - density[sector == k].sum(0)).abs().max() < 5 * 0.5 / math.sqrt(5000)


def test_a_module_that_is_no_proposal_is_named() -> None:
    context = torch.randn(ROWS, 3)
    with pytest.raises(TypeError, match=r"returned a Tensor; expected a torch.distributions.Distribution"):
        DistributionProposal(nn.Linear(3, 1))(context)
    with pytest.raises(ValueError, match=r"batch shape \(3,\) and event shape \(2,\); expected \(3,\) and \(1,\)"):
        DistributionProposal(_Gaussian(3, 2))(context)
    with pytest.raises(ValueError, match=r"batch shape \(3, 2\) and event shape \(\); expected \(3,\) and \(2,\)"):
        DistributionProposal(_Gaussian(3, 2, independent=False), dim=2)(context)
    with pytest.raises(ValueError, match="batch shape"):
        DistributionProposal(lambda context: Normal(torch.zeros(5, 1), 1.0))(context)

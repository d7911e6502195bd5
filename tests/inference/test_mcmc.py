"""Laws of the chains: their stationary distribution, and the adaptation of their steps."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Independent, Normal

from energyreg.densities.bases import Lebesgue, Marginal, ProposalBase
from energyreg.densities.mixtures import GaussianMixture
from energyreg.inference.energy import EnergyFunction
from energyreg.inference.integrators import StratifiedQuadrature
from energyreg.inference.mcmc import (
    MALA,
    Chains,
    Langevin,
    langevin_step,
    mala_init,
    mala_step,
)
from energyreg.inference.points import WeightedPoints
from energyreg.networks.heads import SeparableHead
from energyreg.networks.proposals import MixtureDensityNetwork

DOUBLE = torch.float64


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=DOUBLE)


def _normal(y: Tensor) -> Tensor:
    return -y.square().sum(-1) / 2


# Densities in one dimension: the energy (with any constant), the cdf, and whether y is an angle.


def _bimodal(y: Tensor) -> Tensor:
    left = math.log(0.7 / 0.5) - ((y[..., 0] + 1.2) / 0.5).square() / 2
    return torch.logaddexp(left, math.log(0.3 / 0.8) - ((y[..., 0] - 1.2) / 0.8).square() / 2) + 4


def _bimodal_cdf(y: Any) -> Any:
    return 0.7 * stats.norm.cdf(y, -1.2, 0.5) + 0.3 * stats.norm.cdf(y, 1.2, 0.8)


def _skewed(y: Tensor) -> Tensor:
    """The logarithm of an exponential variable: a long tail to the left, a steep one to the right."""
    return y[..., 0] - y[..., 0].exp()


def _circle(y: Tensor) -> Tensor:
    """A von Mises density whose mode is where the circle is cut."""
    return 1.5 * (y[..., 0] - 3).cos()


DENSITIES = {
    "bimodal": (_bimodal, _bimodal_cdf, False),
    "skewed": (_skewed, stats.loggamma(1.0).cdf, False),
    "circle": (_circle, lambda y: stats.vonmises.cdf(y, 1.5, 3) - stats.vonmises.cdf(-math.pi, 1.5, 3), True),
}
CHAINS = 4000
# The Kolmogorov-Smirnov distance of n independent draws exceeds 2.23 / √n once in 10,000 times.
CRITICAL = 2.23 / math.sqrt(CHAINS)


def _distance(y: Tensor, cdf: Callable[[Any], Any]) -> float:
    return float(stats.kstest(y.flatten().numpy(), cdf).statistic)


@pytest.mark.parametrize("name", DENSITIES)
def test_mala_has_the_density_as_its_stationary_distribution(name: str) -> None:
    # One position of each of 4000 chains, which are independent. They start from a law that is far off; their
    # autocorrelation falls to nothing within some 20 steps, and they make 200.
    f, cdf, periodic = DENSITIES[name]
    mala = MALA(num_samples=1, num_chains=CHAINS, num_warmup=100, thinning=100, periodic=[periodic])
    start = 2 * torch.rand(CHAINS, 1, 1, generator=_generator(1), dtype=DOUBLE)
    assert _distance(start, cdf) > 10 * CRITICAL
    assert _distance(mala(f, start=start, generator=_generator()).y, cdf) < CRITICAL


@pytest.mark.parametrize("name", DENSITIES)
def test_mala_leaves_the_density_as_it_is_at_any_step_size(name: str) -> None:
    # From exact draws, by inversion on a grid, chains stay exact, however coarse the steps; on the circle these cross
    # the cut. Unadjusted steps of this size do not leave the law as it is: the test can tell.
    f, cdf, periodic = DENSITIES[name]
    grid = np.linspace(-math.pi, math.pi, 20_001) if periodic else np.linspace(-30, 10, 400_001)
    uniform = torch.rand(CHAINS, generator=_generator(), dtype=DOUBLE).numpy()
    start = torch.from_numpy(np.interp(uniform, cdf(grid), grid))[:, None, None]
    state = mala_init(f, start)
    y, generator = start, _generator(1)
    for _ in range(10):
        state, _ = mala_step(f, state, 1.2, periodic=[periodic], generator=generator)
        y = langevin_step(f, y, 1.2, periodic=[periodic], generator=generator)
    assert (state.y != start).double().mean() > 0.9
    assert _distance(state.y, cdf) < CRITICAL
    assert not _distance(y, cdf) < 1.5 * CRITICAL  # NaN where they diverge


def test_mala_in_three_dimensions_has_the_moments_of_the_density() -> None:
    # 4000 independent positions: a mean has a standard error of 1 / √4000 = 0.016, a covariance of at most 0.022.
    root = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [-0.3, 0.2, 0.5]], dtype=DOUBLE)
    covariance = root @ root.T

    def f(y: Tensor) -> Tensor:
        return -((y - 1) @ covariance.inverse() * (y - 1)).sum(-1) / 2

    mala = MALA(num_samples=1, num_chains=CHAINS, num_warmup=100, thinning=50, step_size=[0.5, 0.5, 0.3])
    y = mala(f, start=torch.zeros(1, 3, dtype=DOUBLE), generator=_generator()).y[:, 0]
    assert (y.mean(0) - 1).abs().max() < 4 * 0.016
    assert (y.T.cov() - covariance).abs().max() < 4 * 0.022


@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("target", [0.574, 0.8])
def test_warm_up_finds_the_step_size_of_each_row(dim: int, target: float) -> None:
    # Rows whose scales differ a thousandfold. Dual averaging stops within a few hundredths of its target.
    scales = torch.tensor([0.01, 1.0, 10.0], dtype=DOUBLE)
    mala = MALA(num_samples=200, num_chains=16, num_warmup=300, target_acceptance=target)
    chains = mala.run(lambda y: _normal(y / scales[:, None]), start=torch.zeros(3, dim, dtype=DOUBLE))
    assert chains.acceptance is not None
    assert (chains.acceptance - target).abs().max() < 0.06
    relative = chains.step_size / scales
    assert relative.max() < 1.2 * relative.min()


def test_step_size_is_frozen_after_warm_up() -> None:
    mala = MALA(num_samples=1, num_chains=5, num_warmup=40)
    start, generator = _randn(3, 2), _generator()
    short = mala.run(_normal, start=start, generator=generator)
    # The rest of a longer run is that of a sampler of this very step size.
    state, expected = mala_init(_normal, short.samples[-1]), []
    for _ in range(20):
        state, _ = mala_step(_normal, state, short.step_size[:, None], generator=generator)
        expected.append(state.y)
    longer = MALA(num_samples=21, num_chains=5, num_warmup=40).run(_normal, start=start, generator=_generator())
    torch.testing.assert_close(longer.step_size, short.step_size)
    torch.testing.assert_close(longer.samples[1:], torch.stack(expected))


def test_step_size_without_warm_up_is_the_one_given_and_thinning_leaves_positions_out() -> None:
    mala = {t: MALA(12 // t, num_chains=2, num_warmup=0, step_size=[0.2, 0.8], thinning=t) for t in (1, 3)}
    runs = {t: mala[t].run(_normal, start=torch.zeros(4, 2), generator=_generator()) for t in (1, 3)}
    torch.testing.assert_close(runs[1].step_size, torch.full((4,), 0.4))
    assert torch.equal(runs[3].samples, runs[1].samples[2::3])
    torch.testing.assert_close(runs[3].acceptance, runs[1].acceptance)


def test_a_flat_energy_on_a_circle_accepts_every_step_and_no_step_grows_beyond_a_turn() -> None:
    chains = MALA(num_samples=500, periodic=[True]).run(lambda y: torch.zeros(y.shape[:-1]), start=torch.zeros(1, 1))
    assert torch.equal(chains.acceptance, torch.ones(1))
    assert chains.step_size <= 2 * math.pi + 1e-5
    # 4000 independent uniform draws.
    assert _distance(chains.points.y, stats.uniform(-math.pi, 2 * math.pi).cdf) < CRITICAL


def test_mala_rejects_what_is_not_finite() -> None:
    def f(y: Tensor) -> Tensor:  # exp f is exponential, and beyond its support NaN, -inf or infinite
        x = y[..., 0]
        beyond = torch.stack([torch.full_like(x, value) for value in (math.nan, -math.inf, math.inf)])
        index = (x * 1000).floor().long().remainder(3)
        return torch.where(x > 0, -x, beyond.gather(0, index[None])[0])

    mala = MALA(num_samples=1, num_chains=CHAINS, num_warmup=50, thinning=100, step_size=1.0)
    y = mala(f, start=torch.ones(1, 1, dtype=DOUBLE), generator=_generator()).y
    assert _distance(y, stats.expon.cdf) < CRITICAL


@pytest.mark.parametrize("step_size", [0.5, 1.0])
def test_unadjusted_langevin_is_too_wide_by_what_theory_says(step_size: float) -> None:
    # For a standard normal density it is an autoregression. 20,000 independent chains know their variance to 1 %, and
    # 40 steps forget the start: (1 - λ² / 2)^80 is below 1e-4.
    langevin = Langevin(num_steps=40, step_size=step_size, num_chains=20_000)
    y = langevin.sample(_normal, torch.zeros(1, 1, dtype=DOUBLE), generator=_generator())
    assert y.var().item() == pytest.approx(1 / (1 - step_size**2 / 4), rel=0.04)
    assert abs(y.mean()) < 4 * 1.2 / math.sqrt(20_000)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("step_size", [0.3, [0.1, 0.7]])
@pytest.mark.parametrize("noise_scale", [1.0, 0.5, 0.0])
def test_a_langevin_step_is_its_formula(dtype: torch.dtype, step_size: float | list[float], noise_scale: float) -> None:
    y = _randn(4, 3, 2).to(dtype)
    noise = torch.randn(4, 3, 2, generator=_generator(7), dtype=dtype)
    step = torch.as_tensor(step_size, dtype=dtype)
    expected = y + step**2 / 2 * (-4 * y**3) + noise_scale * step * noise
    result = langevin_step(lambda y: -y.pow(4).sum(-1), y, step_size, noise_scale=noise_scale, generator=_generator(7))
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)
    sampler = Langevin(1, step_size, num_chains=4, noise_scale=noise_scale)
    assert torch.equal(sampler.sample(lambda y: -y.pow(4).sum(-1), y, generator=_generator(7)), result)


def test_langevin_starts_every_chain_at_the_target_and_sample_is_the_end_of_run() -> None:
    target = 10 * _randn(6, 2)
    seen = []

    def f(y: Tensor) -> Tensor:
        seen.append(y.detach().clone())
        return _normal(y)

    langevin = Langevin(num_steps=5, step_size=0.1, num_chains=3, num_warmup=2)
    y = langevin.sample(f, start=target, generator=_generator())
    assert torch.equal(seen[0], target.expand(3, -1, -1))
    assert len(seen) == 7  # one gradient per step
    chains = langevin.run(f, start=target, generator=_generator())
    assert chains.samples.shape == (5, 3, 6, 2)
    assert torch.equal(chains.samples[-1], y)
    assert torch.equal(y, langevin.sample(f, start=target.expand(3, -1, -1), generator=_generator()))
    assert chains.acceptance is None
    torch.testing.assert_close(chains.step_size, torch.full((6,), 0.1, dtype=DOUBLE))
    assert torch.equal(langevin(f, start=target, generator=_generator()).y, chains.points.y)


def test_langevin_steps_over_the_cut_of_a_circle() -> None:
    y = langevin_step(
        lambda y: 10 * y.sum(-1), torch.full((1, 1, 2), 3.0), 0.5, noise_scale=0.0, periodic=[True, False]
    )
    torch.testing.assert_close(y, torch.tensor([[[4.25 - 2 * math.pi, 4.25]]]))


SAMPLERS = {"langevin": Langevin(num_steps=6, num_chains=4), "mala": MALA(6, 4, num_warmup=6)}


def _energy(dim: int = 1, periodic: list[bool] | None = None, base: Any = None) -> EnergyFunction:
    base = Marginal(dim, periodic) if base is None else base
    torch.manual_seed(0)
    return EnergyFunction(SeparableHead(context_dim=8, dim=dim, periodic=periodic), torch.randn(5, 8), base)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_no_gradient_reaches_the_parameters(sampler: Langevin | MALA, mode: Any) -> None:
    f = _energy()
    start = torch.zeros(5, 1, requires_grad=True)
    with mode():
        points = sampler(f, start=start, generator=_generator())
    assert not points.y.requires_grad
    assert not points.log_weights.requires_grad
    assert points.y.shape == (24, 5, 1)
    assert start.grad is None
    assert isinstance(f.head, torch.nn.Module)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in f.head.parameters())


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_same_generator_gives_the_same_points_and_leaves_the_global_one_alone(
    sampler: Langevin | MALA, dtype: torch.dtype
) -> None:
    independent = Independent(Normal(torch.zeros(3, 2, dtype=dtype), torch.ones(3, 2, dtype=dtype)), 1)
    mixture = GaussianMixture(torch.zeros(3, 1, dtype=dtype), independent.mean[:, None], independent.stddev[:, None])
    for q in (independent, mixture, None):
        start = torch.zeros(3, 2, dtype=dtype) if q is None else None
        before = torch.get_rng_state()
        first, second, other = (sampler(_normal, q, start=start, generator=_generator(seed)).y for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), before)
        assert first.dtype == dtype
        assert torch.equal(first, second)
        assert not torch.equal(first, other)
        sampler(_normal, q, start=start)  # the global one serves too
        assert not torch.equal(torch.get_rng_state(), before)


def test_rows_do_not_see_each_other() -> None:
    # The same noise for both, as the rows of one run: only the energies differ.
    scales = torch.tensor([1.0, 1.0, 1e3], dtype=DOUBLE)[:, None]
    chains = MALA(20, 4, num_warmup=50).run(
        lambda y: _normal(y / scales), start=torch.zeros(3, 1, dtype=DOUBLE), generator=_generator()
    )
    alike = MALA(20, 4, num_warmup=50).run(_normal, start=torch.zeros(3, 1, dtype=DOUBLE), generator=_generator())
    assert torch.equal(chains.samples[:, :, :2], alike.samples[:, :, :2])
    assert not torch.equal(chains.samples[:, :, 2], alike.samples[:, :, 2])


def test_chains_start_at_samples_of_the_proposal_unless_a_start_is_given() -> None:
    q = GaussianMixture(torch.zeros(3, 1), torch.full((3, 1, 2), 7.0), torch.full((3, 1, 2), 0.1))
    still = Langevin(num_steps=1, step_size=1e-6, num_chains=50)
    y = still(_normal, q, generator=_generator()).y
    assert (y - 7).abs().max() < 0.6
    assert y.std(0).min() > 0.05
    assert still(_normal, q, start=torch.zeros(3, 2)).y.abs().max() < 1e-4


def test_mala_agrees_with_quadrature_on_an_energy_function() -> None:
    f = _energy()
    strong = EnergyFunction(lambda context, v: 20 * f.head(context, v), f.context, f.base)
    exact = StratifiedQuadrature(5000, jitter=False)(strong)
    chains = MALA(num_samples=200, num_chains=30, num_warmup=100).run(
        strong, start=torch.zeros(5, 1), generator=_generator()
    )
    assert chains.rhat.max() < 1.02
    for function in (lambda y: y, torch.square):
        # Four standard errors from the chains' own effective size.
        spread = (exact.expectation(lambda y, h=function: h(y).square()) - exact.expectation(function).square()).sqrt()
        error = (chains.points.expectation(function) - exact.expectation(function)).abs()
        assert (error < 4 * spread / chains.effective_sample_size.sqrt()).all()


def test_chains_stay_in_the_window_of_a_lebesgue_base_and_starts_beyond_it_are_drawn_again() -> None:
    f = _energy(base=Lebesgue())  # density zero beyond ±4
    q = GaussianMixture(torch.zeros(5, 1), torch.zeros(5, 1, 1), torch.full((5, 1, 1), 3.0))
    y = MALA(20, 100, num_warmup=20)(f, q, generator=_generator()).y
    assert y.abs().max() <= 4
    assert y.std() > 1
    with pytest.raises(ValueError, match=r"q: f or its gradient is -inf.* in 51 draws from q for 5 of 5 rows"):
        MALA()(f, GaussianMixture(torch.zeros(5, 1), torch.full((5, 1, 1), 99.0), torch.ones(5, 1, 1)))


def test_mala_on_a_model_that_is_its_proposal_keeps_the_law_of_the_proposal() -> None:
    # KS over 5 rows of 800 independent chains each.
    torch.manual_seed(0)
    context = torch.randn(5, 8, dtype=DOUBLE)
    q = MixtureDensityNetwork(context_dim=8, num_components=3).double()(context)
    f = EnergyFunction(None, context, ProposalBase(Marginal().double()), q)
    y = MALA(1, 800, num_warmup=30, thinning=30)(f, q, generator=_generator()).y
    uniform = q.cdf(y).detach()
    assert _distance(uniform, stats.uniform.cdf) < CRITICAL


def test_points_are_equally_weighted_and_in_the_shape_of_all_others() -> None:
    samples = _randn(7, 3, 5, 2)
    points = Chains(samples, None, torch.ones(5)).points
    assert isinstance(points, WeightedPoints)
    assert not points.independent
    torch.testing.assert_close(points.expectation(), samples.mean((0, 1)))
    torch.testing.assert_close(points.log_weights, torch.full((21, 5), -math.log(21), dtype=DOUBLE))


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Langevin(num_steps=0), "num_steps is 0; expected a whole number of at least 1"),
        (lambda: Langevin(num_steps=2.5), "num_steps is 2.5"),
        (lambda: Langevin(num_chains=0), "num_chains is 0"),
        (lambda: Langevin(num_warmup=-1), "num_warmup is -1; expected a whole number of at least 0"),
        (lambda: Langevin(step_size=0.0), "step_size is 0.0; expected a finite number > 0"),
        (lambda: Langevin(step_size=[0.1, -0.1]), r"step_size is \[0.1, -0.1\]"),
        (lambda: Langevin(step_size=[]), r"step_size is \[\]"),
        (lambda: Langevin(step_size=[[0.1]]), r"step_size is \[\[0.1\]\]"),
        (lambda: Langevin(noise_scale=-1.0), "noise_scale is -1.0; expected a finite number ≥ 0"),
        (lambda: MALA(num_samples=0), "num_samples is 0"),
        (lambda: MALA(num_chains=True), "num_chains is True"),
        (lambda: MALA(num_warmup=-1), "num_warmup is -1"),
        (lambda: MALA(thinning=0), "thinning is 0"),
        (lambda: MALA(step_size=math.nan), "step_size is nan"),
        (lambda: MALA(step_size=math.inf), "step_size is inf"),
        (lambda: MALA(target_acceptance=1.0), r"target_acceptance is 1.0; expected a number in \(0, 1\)"),
        (lambda: MALA(target_acceptance=0.0), "target_acceptance is 0.0"),
        (lambda: langevin_step(_normal, torch.zeros(1, 1, 2), -1.0), "step_size is -1.0"),
        (lambda: langevin_step(_normal, torch.zeros(1, 1, 2), 1.0, noise_scale=math.nan), "noise_scale is nan"),
        (lambda: langevin_step(_normal, torch.zeros(1, 1, 2), [1.0] * 3), "step_size has 3 entries, but y has 2 dim"),
        (lambda: langevin_step(_normal, torch.zeros(1, 1, 2), 1.0, periodic=[True]), "periodic has 1 entries"),
        (lambda: mala_step(_normal, mala_init(_normal, torch.zeros(1, 1, 2)), 0.0), "step_size is 0.0"),
        (lambda: mala_init(lambda y: y, torch.zeros(4, 3, 2)), r"f returned shape \(4, 3, 2\) .*expected \(4, 3\)"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_bad_starts(sampler: Langevin | MALA) -> None:
    with pytest.raises(ValueError, match=r"q and start are both None.*pass start of shape"):
        sampler(_normal)
    with pytest.raises(
        ValueError, match=r"start has shape \(3, 5, 2\).*expected floats of shape \(B, D\).*\(4, B, D\)"
    ):
        sampler(_normal, start=torch.zeros(3, 5, 2))
    with pytest.raises(ValueError, match=r"start has shape \(5, 2\) and dtype torch.int64"):
        sampler(_normal, start=torch.zeros(5, 2, dtype=torch.long))
    start = torch.ones(5, 1)
    start[[1, 4]] = -1
    for bad in (torch.log, lambda y: y.sqrt(), lambda y: torch.where(y > 0, y, -math.inf)):
        with pytest.raises(ValueError, match=r"start: f or its gradient is .* for 2 of 5 rows, the first being row 1"):
            sampler(lambda y, bad=bad: bad(y[..., 0]), start=start)
    with pytest.raises(ValueError, match="step_size has 3 entries, but y has 1 dim"):
        type(sampler)(step_size=[0.1] * 3)(_normal, start=start)
